"""Every selection method keeps exactly what its formula says, computed here token by token in plain Python."""

from __future__ import annotations

import math
import random
from itertools import islice, pairwise

import pytest
import torch
from test_baselines import METHODS as RIVALS

from omnimem.budget import LayerBudget
from omnimem.errors import OmniMemError
from omnimem.memory import CompressedCache
from omnimem.memory.attach import compressed_attention
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import SELECTION_METHODS, Candidates, build_selection
from omnimem.selection.sketch import projection, sketch
from omnimem.selection.topk import keep_mask
from omnimem.token_metadata import TokenMetadata
from oracles import (
    Position,
    best_of,
    observed_mass,
    profile,
    redundancy_of,
    splitmix,
)

HEADS, GROUPS, DIM, WIDTH = 4, 2, 4, 6

PAPER = {
    "lambda": 0.02,
    "factor": "linear",
    "attention_scores": "heads",
    "accumulation": "sum",
    "ema_decay": 0.9,
    "neighbours": "sequence",
    "redundancy": "hidden",
    "sketch_dim": 128,
    "query_stride": 4,
    "seed": 0,
}
RELEASE = {**PAPER, "factor": "sqrt", "attention_scores": "concat", "accumulation": "mean", "query_stride": 1}

METHODS = [
    ("full", {}),
    ("uniform", {}),
    ("random", {}),
    ("random", {"seed": 7}),
    ("omnimem", {}),
    ("omnimem", {"variant": "paper"}),
    ("omnimem", {"variant": "release"}),
    ("omnimem", {"variant": "release", "lambda": 0.04}),
    ("omnimem", {"lambda": 0.0}),
    ("omnimem", {"lambda": 1.0}),
    ("omnimem", {"lambda": 1.0, "factor": "sqrt"}),
    ("omnimem", {"lambda": 1.0, "attention_scores": "concat"}),
    ("omnimem", {"lambda": 1.0, "accumulation": "mean"}),
    ("omnimem", {"lambda": 1.0, "query_stride": 1}),
    ("omnimem", {"lambda": 1.0, "query_stride": 3, "attention_scores": "concat"}),
    ("omnimem", {"lambda": 1.0, "accumulation": "ema"}),
    ("omnimem", {"lambda": 1.0, "accumulation": "ema", "ema_decay": 0.3}),
    ("omnimem", {"neighbours": "modality"}),
    ("omnimem", {"lambda": 1.0, "neighbours": "modality", "attention_scores": "concat", "factor": "sqrt"}),
    ("omnimem", {"redundancy": "sketch"}),
    ("omnimem", {"redundancy": "sketch", "sketch_dim": 16, "seed": 3, "neighbours": "modality"}),
    ("omnimem", {"redundancy": "value"}),
    ("omnimem", {"redundancy": "key", "neighbours": "modality"}),
]


class Simulated:
    """The streams of a batch in every layer, held as lists of `Position` and compressed by the book."""

    def __init__(self, budgets, method, options, batch):
        self.budgets, self.method, self.options = budgets, method, options
        if method == "omnimem":
            base = RELEASE if options.get("variant") == "release" else PAPER
            self.options = {**base, **{k: v for k, v in options.items() if k != "variant"}}
        self.stored = [[[] for _ in range(batch)] for _ in budgets]
        self.seen = [[[] for _ in range(batch)] for _ in budgets]

    def step(self, layer, sample, new, queries, observe):
        old = len(self.stored[layer][sample])
        stored = self.stored[layer][sample] + new
        self.stored[layer][sample] = stored
        self.seen[layer][sample] += new
        if self.method != "omnimem" or not observe or not new:
            return
        mass = observed_mass(queries, stored, self.options["attention_scores"], self.options["query_stride"])
        for k, position in enumerate(stored):
            if k >= old:
                position.mass = mass[k]
            elif self.options["accumulation"] == "sum":
                position.mass += mass[k]
            elif self.options["accumulation"] == "mean":
                position.mass = (position.mass + mass[k]) / 2
            else:
                decay = self.options["ema_decay"]
                position.mass = decay * position.mass + (1 - decay) * mass[k]

    def compress(self, layer, sample):
        stored = self.stored[layer][sample]
        visual, audio = self.budgets[layer]
        if self.method == "full":
            return
        scores = getattr(self, self.method)(layer, stored, self.seen[layer][sample])
        self.stored[layer][sample] = [stored[k] for k in best_of(scores, stored, visual, audio)]

    def uniform(self, layer, stored, seen):
        """Of every token the cells of 2, 4, 8, … tokens that it was the first to enter, of all ever seen."""
        scores = []
        for position in stored:
            before = [other.index for other in seen if other.kind == position.kind and other.index < position.index]
            level = 0
            while all(other >> level != position.index >> level for other in before) and level < 60:
                level += 1
            golden = (position.index >> level) * 11400714819323198485 % 2**64 / 2**64
            scores.append(level + golden if before else math.inf)
        return scores

    def random(self, layer, stored, seen):
        seed = splitmix(layer * 2_147_483_647 + self.options.get("seed", 0))
        return [splitmix((position.index + seed) % (1 << 64)) & ((1 << 53) - 1) for position in stored]

    def omnimem(self, layer, stored, seen):
        source = self.options["redundancy"]
        if source in ("value", "key"):
            vectors = [[x for head in getattr(position, source) for x in head] for position in stored]
        else:
            vectors = [position.hidden for position in stored]
        if source == "sketch":
            hidden = torch.tensor([vectors], dtype=torch.float64)
            vectors = sketch(hidden, self.options["sketch_dim"], layer, self.options["seed"])[0].tolist()
        scores = []
        for k, position in enumerate(stored):
            novelty = 1 - redundancy_of(k, stored, vectors, self.options["neighbours"])
            if self.options["factor"] == "sqrt":
                novelty = math.sqrt(max(novelty, 0.0))
            scores.append(position.mass ** self.options["lambda"] * novelty)
        return scores


def random_kinds(rng, length, mixed_text):
    return [rng.choice((VISUAL, AUDIO, VISUAL, TEXT) if mixed_text else (VISUAL, VISUAL, AUDIO)) for _ in range(length)]


def drive(method, options, *, seed, batch, budgets, pause=None):
    """Run random chunks through the cache and the simulation; yields both retained sets of every layer after each.

    The last sample of a batch ends two steps early, or sits out step `pause`.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    cache = CompressedCache(profile(*budgets), build_selection(method, **options))
    simulated = Simulated(budgets, method, options, batch)
    counters = [0] * batch
    for step in range(6):
        # Prefix and every third step are text that nothing is observed of.
        media = step % 3 != 0
        lengths = [rng.randint(3, 9) for _ in range(batch)]
        if batch > 1 and (step == pause if pause else step >= 4):
            lengths[-1] = 0
        width = max(lengths)
        kinds = [random_kinds(rng, n, step == 2) if media else [TEXT] * n for n in lengths]
        valid = torch.tensor([[k < n for k in range(width)] for n in lengths])
        modality = torch.tensor([row + [TEXT] * (width - len(row)) for row in kinds])
        cache.begin(torch.zeros(3, batch, width, dtype=torch.int64), modality if media else None, valid=valid)
        for number, layer in enumerate(cache.layers):
            query = torch.randn(batch, HEADS, width, DIM, dtype=torch.float64, generator=generator) * 2
            key, value = torch.randn(2, batch, GROUPS, width, DIM, dtype=torch.float64, generator=generator)
            hidden = torch.randn(batch, width, WIDTH, dtype=torch.float64, generator=generator)
            layer.observe_hidden(hidden)
            compressed_attention(None, query, *layer.update(key, value), None, cache_layer=layer)
            for sample, length in enumerate(lengths):
                new = [
                    Position(
                        counters[sample] + k,
                        kinds[sample][k],
                        key[sample, :, k].tolist(),
                        value[sample, :, k].tolist(),
                        hidden[sample, k].tolist(),
                    )
                    for k in range(length)
                ]
                simulated.step(number, sample, new, query[sample, :, :length].tolist(), media)
        counters = [seen + length for seen, length in zip(counters, lengths, strict=True)]
        if not media:
            continue
        cache.compress()
        for number in range(len(budgets)):
            table = cache.token_metadata(number)
            for sample in range(batch):
                simulated.compress(number, sample)
                expected = [position.index for position in simulated.stored[number][sample]]
                yield table.index[sample][table.valid[sample]].tolist(), expected
                real = table.valid[sample]
                kinds_stored = [position.kind for position in simulated.stored[number][sample]]
                assert table.modality[sample][real].tolist() == kinds_stored


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda x: x if isinstance(x, str) else str(x or ""))
@pytest.mark.parametrize("batch", [1, 2])
def test_retained_sets_equal_the_formula_token_by_token(method, options, batch):
    # Budgets far below, about and above what a few chunks bring.
    budgets = [(2, 1), (5, 4), (40, 2), (60, 60)]
    compared = 0
    for seed in range(3):
        with torch.no_grad():
            for ours, expected in drive(method, options, seed=seed, batch=batch, budgets=budgets):
                assert ours == expected
                compared += 1
    assert compared == 3 * 4 * batch * len(budgets)


@pytest.mark.parametrize("accumulation", ["sum", "mean", "ema"])
def test_a_stream_that_sits_out_a_chunk_of_its_batch_keeps_what_it_keeps_alone(accumulation):
    """No chunk of its own was read, so nothing is averaged into the attention scores of what it holds."""
    options = {"lambda": 1.0, "accumulation": accumulation}
    for seed in range(6):
        with torch.no_grad():
            for ours, expected in drive("omnimem", options, seed=seed, batch=2, budgets=[(4, 3)], pause=2):
                assert ours == expected


@pytest.mark.parametrize("method", ["uniform", "random", "omnimem"])
@pytest.mark.parametrize(("visual", "audio"), [(1, 1), (5, 3), (6, 4), (7, 50)])
def test_exactly_the_budget_is_retained_when_there_is_as_much(method, visual, audio):
    candidates = random_candidates(visual=6, audio=4, text=3, budget=LayerBudget(visual, audio))
    keep = keep_mask(build_selection(method).score(candidates), candidates.metadata, candidates.budget)[0]
    kinds = candidates.metadata.modality[0][keep]
    assert (kinds == VISUAL).sum() == min(visual, 6)
    assert (kinds == AUDIO).sum() == min(audio, 4)
    assert (kinds == TEXT).sum() == 3


def table_of(kinds: list[int]) -> TokenMetadata:
    count = len(kinds)
    return TokenMetadata(
        index=torch.arange(count)[None],
        position_ids=torch.zeros(1, count, 3, dtype=torch.int64),
        time=torch.zeros(1, count),
        modality=torch.tensor([kinds], dtype=torch.int8),
        valid=torch.ones(1, count, dtype=torch.bool),
    )


def random_candidates(*, visual: int, audio: int, text: int, budget: LayerBudget, layer: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    kinds = [VISUAL] * visual + [AUDIO] * audio + [TEXT] * text
    random.Random(0).shuffle(kinds)
    shape = (1, GROUPS, len(kinds), DIM)
    return Candidates(
        layer=layer,
        num_layers=5,
        budget=budget,
        num_previous=0,
        probe_scores=(),
        keys=torch.randn(shape, generator=generator),
        values=torch.randn(shape, generator=generator),
        metadata=table_of(kinds),
        attention_scores=torch.rand(1, len(kinds), generator=generator),
        features=torch.randn(1, len(kinds), WIDTH, generator=generator),
    )


def test_ties_go_to_the_more_recent():
    kinds = [VISUAL, AUDIO, VISUAL, TEXT, AUDIO, VISUAL, VISUAL, AUDIO]
    keep = keep_mask(torch.zeros(1, 8), table_of(kinds), LayerBudget(visual=2, audio=1))
    assert keep[0].nonzero().flatten().tolist() == [3, 5, 6, 7]
    higher_first = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    keep = keep_mask(higher_first, table_of(kinds), LayerBudget(visual=2, audio=1))
    assert keep[0].nonzero().flatten().tolist() == [0, 3, 6, 7]


def test_identical_frames_keep_their_latest_tokens():
    """All states equal and λ = 0: every score of the middle is the same, and the latest tokens stay."""
    candidates = random_candidates(visual=9, audio=0, text=0, budget=LayerBudget(3, 1))
    still = torch.zeros(1, 9, WIDTH)
    still[..., 0] = 1.0
    candidates = Candidates(**{**vars(candidates), "features": still})
    score = build_selection("omnimem", lambda_=0.0).score(candidates)
    keep = keep_mask(score, candidates.metadata, candidates.budget)
    assert keep[0].nonzero().flatten().tolist() == [6, 7, 8]


@pytest.mark.parametrize("lambda_", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_scores_are_finite_where_nobody_attends_and_states_repeat_or_vanish(variant, lambda_):
    candidates = random_candidates(visual=9, audio=3, text=2, budget=LayerBudget(3, 1))
    for features in (torch.zeros(1, 14, WIDTH), torch.ones(1, 14, WIDTH), candidates.features):
        changed = Candidates(**{**vars(candidates), "features": features, "attention_scores": torch.zeros(1, 14)})
        score = build_selection("omnimem", variant=variant, lambda_=lambda_).score(changed)
        assert score.isfinite().all()
        assert keep_mask(score, changed.metadata, changed.budget).sum() == 3 + 1 + 2


def test_more_attention_and_more_novelty_score_higher():
    candidates = random_candidates(visual=9, audio=0, text=0, budget=LayerBudget(3, 1))
    method = build_selection("omnimem", lambda_=0.02)
    more = candidates.attention_scores.clone()
    more[0, 4] *= 2
    louder = method.score(Candidates(**{**vars(candidates), "attention_scores": more}))
    score = method.score(candidates)
    assert louder[0, 4] > score[0, 4]
    assert torch.equal(louder[0, :4], score[0, :4])


def test_the_release_ranks_like_the_paper_with_twice_its_lambda():
    """√(1 − s) halves the second term, so λ = 0.02 there is 0.04 here."""
    candidates = random_candidates(visual=30, audio=10, text=0, budget=LayerBudget(3, 1))
    sqrt = build_selection("omnimem", factor="sqrt", lambda_=0.02).score(candidates)
    linear = build_selection("omnimem", factor="linear", lambda_=0.04).score(candidates)
    assert torch.equal(sqrt.argsort(), linear.argsort())


def test_half_precision_states_are_scored_in_float32():
    candidates = random_candidates(visual=9, audio=3, text=2, budget=LayerBudget(3, 1))
    half = candidates.features.bfloat16()
    score = build_selection("omnimem").score(Candidates(**{**vars(candidates), "features": half}))
    exact = build_selection("omnimem").score(Candidates(**{**vars(candidates), "features": half.float()}))
    assert score.dtype == torch.float32
    assert torch.equal(score, exact)


# ---- uniform and random --------------------------------------------------------------------------------------------


def kinds_of(pattern: str, length: int, rng: random.Random) -> list[int]:
    """Modalities of a chunk: video alone, both at random, or video and then audio, as encoders bring them."""
    if pattern == "video":
        return [VISUAL] * length
    if pattern == "mixed":
        return [rng.choice((VISUAL, VISUAL, VISUAL, AUDIO)) for _ in range(length)]
    return [VISUAL] * (length // 4) + [AUDIO] * (length - length // 4)


def watch(cache: CompressedCache, chunks: list[list[int]]) -> None:
    """Put chunks of one sample, given by their modalities, into the cache."""
    for kinds in chunks:
        cache.begin(torch.zeros(3, 1, len(kinds), dtype=torch.int64), torch.tensor([kinds]))
        with torch.no_grad():
            for layer in cache.layers:
                layer.update(*torch.zeros(2, 1, GROUPS, len(kinds), DIM))
        cache.compress()


@pytest.mark.parametrize("pattern", ["video", "mixed", "blocks"])
@pytest.mark.parametrize("budget", [2, 3, 17, 64, 100, 127])
def test_uniform_is_even_over_everything_seen_after_every_chunk(pattern, budget):
    """No token seen is further after a retained one than twice the distance of as many evenly spaced ones."""
    rng = random.Random(budget)
    cache = CompressedCache(profile((budget, budget)), build_selection("uniform"))
    seen = {VISUAL: [], AUDIO: []}
    total = 0
    for _ in range(40):
        kinds = kinds_of(pattern, rng.randint(20, 130), rng)
        for kind in kinds:
            seen[kind].append(total)
            total += 1
        watch(cache, [kinds])
        table = cache.token_metadata(0)
        for kind, arrived in seen.items():
            kept = table.index[0][table.modality[0] == kind].tolist()
            assert len(kept) == min(budget, len(arrived))
            if len(kept) < len(arrived):
                even = (arrived[-1] - arrived[0]) / (budget - 1)
                behind = [index - max(one for one in kept if one <= index) for index in arrived]
                assert max(behind) < 2 * even
    if pattern != "video":
        return
    kept = cache.token_metadata(0).index[0].tolist()
    gaps = [after - before for before, after in pairwise(kept)][1:]
    assert not gaps or max(gaps) <= 2 * min(gaps)
    # So every part of the stream has its share: at most a few more or less than the average.
    for quarter in range(4):
        share = sum(quarter * total <= 4 * index < (quarter + 1) * total for index in kept)
        assert abs(share - budget / 4) <= 3


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_samples_of_the_stream_do_not_depend_on_the_chunking(method):
    kept = []
    for cuts in ([40], [10, 20, 10], [1] * 40, [39, 1]):
        cache = CompressedCache(profile((7, 3), (4, 5)), build_selection(method))
        kinds = iter(kinds_of("mixed", 40, random.Random(1)))
        watch(cache, [list(islice(kinds, size)) for size in cuts])
        kept.append([cache.token_metadata(layer).index[0].tolist() for layer in (0, 1)])
    assert kept.count(kept[0]) == len(kept)
    assert kept[0][0] != kept[0][1]


def test_random_is_uniform_over_the_stream():
    """Over many seeds every token is kept equally often, and neighbours independently of each other."""
    seeds, count, budget = 3000, 40, 8
    times_kept = torch.zeros(count)
    pairs = 0
    for seed in range(seeds):
        candidates = random_candidates(visual=count, audio=0, text=0, budget=LayerBudget(budget, 1), layer=seed % 5)
        score = build_selection("random", seed=seed).score(candidates)
        keep = keep_mask(score, candidates.metadata, candidates.budget)[0]
        times_kept += keep
        pairs += int((keep[1:] & keep[:-1]).sum())
    expected = seeds * budget / count
    chi_square = ((times_kept - expected) ** 2 / expected).sum().item()
    # 39 degrees of freedom (and less variance, as 8 are always kept): 80 is beyond one in ten thousand.
    assert chi_square < 80
    expected_pairs = seeds * (count - 1) * (budget / count) * ((budget - 1) / (count - 1))
    assert abs(pairs / expected_pairs - 1) < 0.1


# ---- sketches ------------------------------------------------------------------------------------------------------


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


@pytest.mark.parametrize(("size", "correlation"), [(64, 0.9), (128, 0.95), (512, 0.98)])
def test_sketches_keep_the_order_of_cosines(size, correlation):
    generator = torch.Generator().manual_seed(0)
    # A slow walk: neighbours are similar, some more than others.
    steps = torch.randn(400, 256, generator=generator) * torch.rand(400, 1, generator=generator)
    hidden = (torch.randn(256, generator=generator) * 3 + steps)[None]
    small = sketch(hidden, size, layer=3, seed=0)
    assert torch.equal(small, small.to(torch.int8).float()) and small.shape == (1, 400, size)
    exact = torch.cosine_similarity(hidden[0, 1:], hidden[0, :-1], dim=-1)
    rough = torch.cosine_similarity(small[0, 1:].double(), small[0, :-1].double(), dim=-1)
    assert torch.corrcoef(torch.stack((ranks(exact), ranks(rough))))[0, 1] >= correlation
    assert (exact - rough).abs().mean() <= 1.5 / size**0.5


def test_sketches_are_the_same_in_every_run_and_blind_to_scale():
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    first = sketch(hidden, 32, layer=1, seed=0)
    sketch_again = sketch(hidden * 1024, 32, layer=1, seed=0)
    assert torch.equal(first, sketch_again)
    assert not torch.equal(first, sketch(hidden, 32, layer=2, seed=0))
    assert not torch.equal(first, sketch(hidden, 32, layer=1, seed=1))
    torch.manual_seed(99)
    projection.cache_clear()
    assert torch.equal(first, sketch(hidden, 32, layer=1, seed=0))
    assert first.abs().amax(-1).eq(127).all()
    assert torch.equal(sketch(torch.zeros(1, 2, 16), 32, 0, 0), torch.zeros(1, 2, 32))


# ---- names and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "wrong", "suggestion"),
    [
        ("omnimen", {}, "omnimen", "did you mean 'omnimem'"),
        ("ful", {}, "ful", "did you mean 'full'"),
        ("omnimem", {"lamb": 0.1}, "lamb", "did you mean 'lambda'"),
        ("omnimem", {"neighbors": "modality"}, "neighbors", "did you mean 'neighbours'"),
        ("omnimem", {"variant": "relase"}, "relase", "did you mean 'release'"),
        ("random", {"sed": 1}, "sed", "did you mean 'seed'"),
        ("uniform", {"seed": 1}, "seed", "known: position_ids"),
        ("zzz", {}, "zzz", "known: attention_only, dms, full"),
    ],
)
def test_unknown_names_are_one_line_with_a_suggestion(name, options, wrong, suggestion):
    with pytest.raises(OmniMemError) as error:
        build_selection(name, **options)
    assert repr(wrong) in str(error.value)
    assert suggestion in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"factor": "sqr"},
        {"attention_scores": "head"},
        {"accumulation": "max"},
        {"neighbours": "modal"},
        {"redundancy": "hiden"},
        {"lambda": float("nan")},
        {"ema_decay": 1.5},
        {"sketch_dim": 0},
    ],
    ids=str,
)
def test_a_value_that_a_switch_does_not_have_is_refused(options):
    """A misspelt value must not silently mean the other setting."""
    with pytest.raises(OmniMemError) as error:
        build_selection("omnimem", **options)
    assert next(iter(options)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda x: x if isinstance(x, str) else str(x or ""))
def test_recorded_settings_rebuild_the_same_method(method, options):
    built = build_selection(method, **options)
    again = build_selection(method, **built.recorded())
    assert type(again) is type(built)
    assert again.recorded() == built.recorded()
    assert again.attention_scores == built.attention_scores and again.stores_features == built.stores_features


def test_variants_are_the_two_published_settings():
    paper = build_selection("omnimem", variant="paper").settings()
    release = build_selection("omnimem", variant="release").settings()
    assert paper == {"variant": "paper", **PAPER}
    assert release == {"variant": "release", **RELEASE}


def test_every_method_has_a_row_here_or_among_the_rivals():
    assert {name for name, _ in METHODS + RIVALS} == set(SELECTION_METHODS)

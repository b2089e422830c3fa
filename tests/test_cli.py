"""The entry points: imports at start, called functions, and failures."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import omnimem
import omnimem.cli
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.cli import main
from omnimem.errors import OmniMemError
from omnimem.guard import run_guarded

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "rich", "numpy", "omegaconf"}
COMMANDS = [
    *([], ["export"], ["answer"], ["calibrate"], ["compare"], ["bench"]),
    *(["profile"], ["profile", "show"], ["profile", "convert"]),
]


def start(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def worker(monkeypatch):
    """Replace the module that a command imports its function from."""

    def install(module, name, function):
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return install


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    code = f"""
import atexit, sys
from omnimem.cli import main
atexit.register(lambda: print("HEAVY", sorted({HEAVY!r} & set(sys.modules))))
main({[*command, "--help"]!r})
"""
    done = start("-c", code)
    assert done.returncode == 0 and "usage: omnimem" in done.stdout
    assert done.stdout.endswith("HEAVY []\n"), done.stdout


def test_import_omnimem_imports_nothing_heavy_and_lists_its_names():
    code = f"import sys, omnimem; assert {set(omnimem.__all__)!r} <= set(dir(omnimem))"
    code += f"; sys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert start("-c", code).returncode == 0
    assert omnimem.OmniMemError is OmniMemError and omnimem.BudgetProfile is BudgetProfile
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = omnimem.nonsense


def test_version_and_module_form():
    done = start("-m", "omnimem", "--version")
    assert (done.returncode, done.stdout) == (0, f"omnimem {omnimem.__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nosuch"],
        ["export", "run"],
        ["answer", "model", "clip.mp4"],
        ["answer", "m", "c", "q", "--fps", "0"],
        ["answer", "m", "c", "q", "--fps", "nan"],
        ["answer", "m", "c", "q", "--fps", "1e-308"],
        ["answer", "m", "c", "q", "--max-seconds", "1e-308"],
        ["answer", "m", "c", "q", "--mean-budget", "0"],
        ["answer", "m", "c", "q", "--mean-budget", "1.5"],
        ["answer", "m", "c", "q", "--at", "-1"],
        ["answer", "m", "c", "q", "--dtype", "fp16"],
        ["profile"],
        ["profile", "convert", "a", "b", "--to", "yaml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_export_calls_its_worker(worker):
    calls = []
    worker("train.export", "export_run", lambda **kwargs: calls.append(kwargs))
    assert main(["export", "runs/x", "--out", "y"]) == 0
    assert main(["export", "runs/x", "--out", "y", "--overwrite", "--dtype", "float32", "--device", "cuda"]) == 0
    plain = {"run": Path("runs/x"), "out": Path("y"), "overwrite": False, "dtype": None, "base": None, "device": "cpu"}
    assert calls == [plain, {**plain, "overwrite": True, "dtype": "float32", "device": "cuda"}]


def test_answer_calls_its_worker(worker):
    calls = []
    worker("omnimem.answer", "answer_command", calls.append)
    assert main(["answer", "tiny", "clip.mp4", "Who?"]) == 0
    argv = [
        "answer",
        "tiny",
        "clip.mp4",
        "Who?",
        "--json",
        "--no-audio",
        "--at",
        "12.5",
        "--mean-budget",
        "64",
    ]
    argv += [
        "--ratio",
        "2",
        "--fps",
        "0.5",
        "--chunk-seconds",
        "4",
        "--max-seconds",
        "60",
        "--method",
        "recent",
    ]
    argv += ["--variant", "release", "--profile", "p.json", "--max-new-tokens", "8", "--device", "cpu"]
    argv += ["--dtype", "float32", "--allow-truncated", "--kv-dtype", "int8"]
    assert main(argv) == 0
    plain, full = (dict(vars(args)) for args in calls)
    for args in (plain, full):
        del args["command"]
    assert plain == {
        **dict.fromkeys(
            ["at", "profile", "mean_budget", "gib", "ratio", "method", "variant", "kv_dtype", "device", "dtype"]
        ),
        **dict.fromkeys(["fps", "chunk_seconds", "max_seconds"]),
        **{"model": "tiny", "media": Path("clip.mp4"), "question": "Who?", "max_new_tokens": 256},
        **{"json": False, "audio": True, "allow_truncated": False, "debug": False},
    }
    assert full == {
        **{"model": "tiny", "media": Path("clip.mp4"), "question": "Who?", "max_new_tokens": 8},
        **{"json": True, "audio": False, "allow_truncated": True, "debug": False, "at": 12.5},
        **{
            "profile": Path("p.json"),
            "mean_budget": 64,
            "ratio": 2.0,
            "gib": None,
            "method": "recent",
            "variant": "release",
            "kv_dtype": "int8",
        },
        **{"fps": 0.5, "chunk_seconds": 4.0, "max_seconds": 60.0, "device": "cpu", "dtype": "float32"},
    }
    assert isinstance(full["mean_budget"], int)


@pytest.mark.parametrize("command", [*COMMANDS, ["data", "validate"], ["data", "prepare"]], ids=" ".join)
def test_an_argument_that_is_not_utf8_gives_one_line(command, capsys):
    assert main([*command, os.fsdecode(b"caf\xe9.mp4")]) == 2
    line = "omnimem: argument 'caf\\udce9.mp4' is not valid UTF-8 text; rename the file\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("command", [["train.py", "recipe=quickstart"], ["-m", "omnimem", "profile", "show"]])
def test_bytes_that_are_not_utf8_give_one_line(command):
    done = start(*command, b"data.path=\xff", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert r"argument 'data.path=\udcff' is not valid UTF-8 text" in done.stderr


def test_a_message_with_text_that_cannot_be_printed_is_printed(capsys):
    def fail():
        raise OmniMemError("no file a\ud800")

    assert run_guarded("omnimem", fail) == 2
    assert capsys.readouterr().err == "omnimem: no file a\\ud800\n"


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000], ids=["name", "path"])
def test_a_path_that_is_too_long_is_one_line(name, capsys):
    assert main(["profile", "show", name]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error and error.count("\n") == 1


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "inf", "1e400", "2147483648"])
def test_too_large_numbers_give_one_line(value, capsys):
    for option in ("--mean-budget", "--ratio", "--fps"):
        with pytest.raises(SystemExit) as caught:
            main(["answer", "m", "c", "q", option, value])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and f"argument {option}: " in error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OmniMemError("clip.mp4: no such\nfile"), 2, "omnimem: clip.mp4: no such file\n"),
        (KeyboardInterrupt(), 1, "omnimem: interrupted\n"),
        (
            RuntimeError("shape\n  [1, 2]"),
            1,
            "omnimem: internal error: RuntimeError: shape [1, 2] (run with --debug for the traceback)\n",
        ),
    ],
    ids=["mistake", "interrupted", "defect"],
)
def test_a_failure_is_one_line_and_a_traceback_only_on_request(worker, capsys, error, status, line):
    def fail(args):
        raise error

    worker("omnimem.answer", "answer_command", fail)
    command = ["answer", "m", "c", "q"]
    assert main(command) == status
    assert capsys.readouterr().err == line
    for argv in (["--debug", *command], [*command, "--debug"]):
        assert main(argv) == status
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback") and shown.splitlines()[-1].startswith("omnimem: ")


def test_a_closed_stdout_is_not_an_error():
    show = "import sys; sys.argv[0] = 'omnimem'; from omnimem.guard import run_guarded as run"
    code = f"{show}\nsys.exit(run('omnimem', lambda: [print('x' * 99) for _ in range(99_999)]))"
    command = f'"{sys.executable}" -c "$CODE" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, len(done.stdout)) == (1, "", 100)


def test_another_broken_pipe_is_an_error():
    code = """
import sys
from omnimem.guard import run_guarded
def work():
    raise BrokenPipeError(32, "a worker died")
sys.exit(run_guarded("omnimem", work))
"""
    done = start("-c", code)
    assert done.returncode == 1 and "internal error: BrokenPipeError: [Errno 32] a worker died" in done.stderr


def test_profile_show_and_convert(tmp_path, capsys):
    lists, profile, again = tmp_path / "lists.json", tmp_path / "profile.json", tmp_path / "again.json"
    lists.write_text("[[10, 50], [20, 100]]")
    assert main(["profile", "convert", str(lists), str(profile)]) == 0
    assert BudgetProfile.load(profile).layers == (LayerBudget(50, 10), LayerBudget(100, 20))
    assert main(["profile", "convert", str(profile), str(again), "--to", "list"]) == 0
    assert json.loads(again.read_text()) == [[10, 50], [20, 100]]
    capsys.readouterr()
    assert main(["profile", "show", str(profile)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:] == [
        ["0", "50", "10", "60"],
        ["1", "100", "20", "120"],
        ["mean", "budget:", "90", "tokens", "per", "layer"],
    ]


def test_profile_needs_no_torch(tmp_path):
    (tmp_path / "lists.json").write_text("[[10, 50]]")
    code = "import sys; from omnimem.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert start("-c", code, "profile", "show", str(tmp_path / "lists.json")).returncode == 0


def test_train_prints_one_line_and_exits_2():
    done = start("train.py", "recipe=nosuch")
    assert done.returncode == 2
    assert done.stderr.startswith("train: unknown recipe 'nosuch'; ") and done.stderr.count("\n") == 1
    done = start("train.py", "recipe=quickstart", "train.learning_rate=fast")
    assert (done.returncode, done.stderr) == (2, "train: train.learning_rate takes a number, got 'fast'\n")
    assert "Traceback" in start("train.py", "--debug", "recipe=nosuch").stderr
    assert "Recipes: " in start("train.py", "--help").stdout


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_only_rank_0_reports_a_bad_recipe(variable):
    first, second = (start("train.py", "recipe=nosuch", **{variable: rank}) for rank in "01")
    assert first.returncode == second.returncode == 2
    assert first.stderr.count("\n") == 1 and second.stderr == ""


def test_import_train_is_the_package():
    assert start("-c", "import train, train.command; assert train.__path__").returncode == 0


def run_train(argv, worker, run):
    """Run `train.py` in this process with a replaced training loop."""
    import runpy

    worker("train.loop", "run", run)
    return runpy.run_path(str(ROOT / "train.py"))["main"](argv)


def test_train_passes_the_recipe_to_the_loop(worker, tmp_path):
    recipes = []
    argv = ["recipe=quickstart", "train.max_steps=2", f"output_dir={tmp_path}", "--debug"]
    assert run_train(argv, worker, recipes.append) == 0
    assert (recipes[0].recipe, recipes[0].train.max_steps, recipes[0].output_dir) == (
        "quickstart",
        2,
        str(tmp_path),
    )


def test_an_error_of_one_rank_is_reported_by_that_rank(worker, capsys, monkeypatch):
    def run(recipe):
        raise OmniMemError("clip.mp4: cannot be decoded")

    monkeypatch.setenv("RANK", "3")
    assert run_train(["recipe=quickstart"], worker, run) == 2
    assert capsys.readouterr().err == "train (rank 3): clip.mp4: cannot be decoded\n"


def test_under_accelerate_launch_the_error_line_comes_first():
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--quiet", "train.py", "recipe=nosuch"]
    done = start(*launch)
    assert done.returncode == 1  # of the launcher, which reports every failure of a script as 1
    assert done.stderr.startswith("train: unknown recipe 'nosuch'; ") and done.stderr.count("\n") == 1

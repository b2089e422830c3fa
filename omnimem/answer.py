"""The command ``omnimem answer``: stream a clip with a bounded cache, show progress, and answer a question about it.

    omnimem answer runs/quickstart clip.mp4 "What is heard?" --json

Progress goes to stderr and the answer to stdout, for scripts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from rich.console import Console
from rich.live import Live
from rich.text import Text

from omnimem.errors import OmniMemError
from omnimem.stream import StreamEvent, StreamingSession


def answer_command(args: argparse.Namespace) -> None:
    """Load the model, stream the clip, ask, print; `args` are those of `omnimem.cli`."""
    if not args.question.strip():
        raise OmniMemError("the question is empty: give a text")
    session = open_session(args)
    console = Console(stderr=True)
    started = time.perf_counter()
    event: StreamEvent | None = None
    tokens = 0
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        for event in session.watch(args.media):
            tokens += event.new_tokens
            live.update(progress_line(event))
            if args.at is not None and event.seconds >= args.at:
                break
    assert event is not None  # a file without any chunk raises MediaError
    watched = time.perf_counter()
    console.print(progress_line(event), soft_wrap=True)
    if args.at is not None and event.seconds < args.at:
        console.print(
            f"the media ended at {event.seconds:.1f} s, before --at {args.at:g}: asking at the end", soft_wrap=True
        )
    pieces: list[str] = []
    first_token = None
    for piece in session.ask(args.question, stream=True, max_new_tokens=args.max_new_tokens):
        if piece and first_token is None:
            first_token = time.perf_counter() - watched
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
        return
    report = {
        "answer": "".join(pieces),
        "question": args.question,
        "media": str(args.media),
        "model": args.model,
        **asdict(event),
        "tokens": tokens,
        "mean_budget": session.profile.mean_budget,
        "method": session.method,
        "kv_dtype": session.cache.kv_dtype,
        "watch_seconds": watched - started,
        "first_token_seconds": first_token,
    }
    json.dump(report, sys.stdout, indent=2, ensure_ascii=False)
    print()


def open_session(args: argparse.Namespace) -> StreamingSession:
    """A session with the command's options; the defaults are those the checkpoint was trained with."""
    settings = {
        "fps": args.fps,
        "chunk_seconds": args.chunk_seconds,
        "max_seconds": args.max_seconds,
        "audio": None if args.audio else False,
        "on_truncated": "warn" if args.allow_truncated else None,
    }
    options = {} if args.variant is None else {"variant": args.variant}
    return StreamingSession.from_pretrained(
        args.model,
        profile=args.profile,
        method=args.method,
        settings={key: value for key, value in settings.items() if value is not None},
        mean_budget=args.mean_budget,
        ratio=args.ratio,
        gib=args.gib,
        kv_dtype=args.kv_dtype,
        device=args.device or "auto",
        dtype=args.dtype or "auto",
        **options,
    )


def progress_line(event: StreamEvent) -> Text:
    """Seconds read, retained tokens, resident bytes and the peak of allocated bytes so far, on one line."""
    total = "" if event.duration is None else f" of {event.duration:.0f}"
    tokens = " + ".join(f"{event.retained[kind]:.0f} {kind}" for kind in ("visual", "audio", "text"))
    size, peak = event.resident_bytes / 2**20, event.peak_bytes / 2**20
    return Text(
        f"{event.seconds:.0f}{total} s read · retained {tokens} tokens per layer · {size:.2f} MiB, peak {peak:.2f} MiB"
    )

"""`python -m cupaged`: the main job; `info` and `explain` are its subcommands."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

import numpy as np

from cupaged import examples, mainjob
from cupaged.backend import BACKENDS, Backend
from cupaged.errors import BackendUnavailableError
from cupaged.info import info
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: all is well. 1: a result is wrong. 2: the arguments, or a backend that can't be had.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            if options.backend is not None or options.seed is not None:
                parser.error("info takes neither --backend nor --seed")
            print(info())
            return 0
        backend: Backend = options.backend or "auto"
        seed = secrets.randbits(32) if options.seed is None else options.seed
        if options.command is None:
            return mainjob.main(backend, seed)
        try:
            print(_explain(options, backend, seed))
        except (TypeError, ValueError, NotImplementedError) as error:
            parser.error(str(error))
        return 0
    except BackendUnavailableError as error:
        print(f"cupaged: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupaged",
        description="Without a command: attention over the paged batch of FlashInfer issue 192, "
        "checked request by request, on the GPU if there is one and on the host.",
    )
    _add_common(parser, default=None)
    commands = parser.add_subparsers(dest="command", metavar="{info,explain}")
    commands.add_parser("info", help="versions, GPUs, the cache of compiled kernels")
    plan = commands.add_parser("explain", help="a plan as text: tiles, splits, predicted balance")
    # What was given before the command stands where it isn't given again behind it.
    _add_common(plan, default=argparse.SUPPRESS)
    examples.add_options(plan)
    plan.add_argument("--fixed-split-size", type=int, metavar="PAGES")
    plan.add_argument("--disable-split-kv", action="store_true")
    return parser


def _add_common(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=default,
        help="auto, the default: CUDA where there is a GPU",
    )
    parser.add_argument("--seed", type=_seed, default=default, help="random by default")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 0")
    return int(text)


def _explain(options: argparse.Namespace, backend: Backend, seed: int) -> str:
    batch = examples.from_options(options, np.random.default_rng(seed))
    wrapper = BatchPrefillWithPagedKVCacheWrapper(backend=mainjob.choose_backends(backend)[0][0])
    wrapper.plan(
        **batch.plan_arguments(np.arange(batch.pages.sum(), dtype=np.int32)),
        fixed_split_size=options.fixed_split_size,
        disable_split_kv=options.disable_split_kv,
    )
    drawn = f"seed {seed}\n" if options.example == "issue-192" else ""
    return drawn + wrapper.explain()


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)

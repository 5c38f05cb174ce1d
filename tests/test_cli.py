"""The command line: its options, `explain` as a command, and which backends run."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from processes import NO_GPU, run_module, run_python

from cupaged import __main__ as command
from cupaged import devices, mainjob
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DeviceModel


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(["explain", "--backend", "reference", *arguments]) == 0
    return capsys.readouterr().out


def test_explain_as_a_command() -> None:
    done = run_module("explain", "--seed", "3", **NO_GPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seed 3\nbatch of 10 requests, causal attention, float16\n")
    assert " pages of 32 (NHD)" in done.stdout
    assert re.search(r"^launch 1 of \d: prefill_", done.stdout, re.MULTILINE)


def test_explain_the_mixed_batch(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys, "--example", "mixed")
    assert text.startswith("batch of 64 requests,")
    assert "queries   2,111 in all, 1..2,048 a request" in text
    assert "keys      290,816 in all, 4,096..32,768 a request" in text
    assert "32 query heads over 8 KV heads" in text
    assert " 18,176 pages of 16 (NHD)" in text


def test_explain_a_batch_of_one_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(
        capsys, "--batch-size", "3", "--prefix", "1000", "--append", "1..9", "--num-qo-heads", "7",
        "--num-kv-heads", "1", "--head-dim", "64", "--page-size", "5", "--dtype", "bfloat16",
        "--no-causal", "--fixed-split-size", "20",
    )  # fmt: skip
    assert "batch of 3 requests, full attention, bfloat16" in text
    assert "7 query heads over 1 KV head (groups of 7), head_dim 64" in text
    assert "pages of 5 (NHD)" in text
    assert "of at most 100 keys" in text
    assert "splits    none" in explained(
        capsys, "--batch-size", "1", "--prefix", "90000", "--append", "1", "--disable-split-kv"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--num-qo-heads", "7"], "num_qo_heads = 7, expected a multiple of"),
        (["explain", "--head-dim", "80"], "head_dim_qk = 80"),
        (["explain", "--dtype", "float32"], "q_data_type = float32"),
        (["explain", "--page-size", "0"], "--page-size = 0, expected at least 1"),
        (["explain", "--batch-size", "-1"], "--batch-size = -1, expected at least 0"),
        (["explain", "--prefix", "9..3"], "--prefix: '9..3', expected a length or LOW..HIGH"),
        (["explain", "--append", "some"], "--append: 'some', expected a length or LOW..HIGH"),
        (["explain", "--fixed-split-size", "0"], "fixed_split_size = 0, expected at least 1"),
        (["explain", "--example", "mixed", "--append", "1"], "mixed takes no --append"),
        (["--seed", "1", "explain", "--example", "mixed"], "mixed takes no --seed"),
        (["--seed", "-1"], "--seed: '-1', expected a whole number of at least 0"),
        (["--seed", "1", "info"], "info takes neither --backend nor --seed"),
        (["--backend", "reference", "info"], "info takes neither --backend nor --seed"),
        (["--backend", "rocm"], "invalid choice: 'rocm'"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err.splitlines()[-1]


def test_options_before_the_command_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def choose(choice: str) -> Any:
        asked.append(choice)
        return ("reference",), ""

    monkeypatch.setattr(mainjob, "choose_backends", choose)
    assert command.main(["--seed", "8", "--backend", "cuda", "explain"]) == 0
    assert command.main(["--seed", "8", "explain", "--seed", "9"]) == 0
    seeds = re.findall(r"^seed (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert seeds == ["8", "9"]
    assert asked == ["cuda", "auto"]


# Which backends run


@pytest.mark.parametrize("arguments", [(), ("explain",)])
def test_no_gpu_where_cuda_is_asked_for(arguments: tuple[str, ...]) -> None:
    done = run_module(*arguments, "--backend", "cuda", **NO_GPU)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"cupaged: .*(install|host arrays).*\n", done.stderr)


def test_backends_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDevice=lambda: 0)
    module = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(devices, "cupy", lambda: module)
    monkeypatch.setattr(devices, "device_model", lambda device: DeviceModel(132, 90))
    assert mainjob.choose_backends("auto") == (("cuda", "reference"), "")
    assert mainjob.choose_backends("cuda") == (("cuda",), "")
    assert mainjob.choose_backends("reference") == (("reference",), "")


def test_backends_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendUnavailableError("install a GPU")

    monkeypatch.setattr(devices, "cupy", missing)
    assert mainjob.choose_backends("auto") == (("reference",), "install a GPU")
    assert mainjob.choose_backends("reference") == (("reference",), "")
    with pytest.raises(BackendUnavailableError, match="install a GPU"):
        mainjob.choose_backends("cuda")


def test_a_reader_that_stops_early_is_no_error() -> None:
    """As `python -m cupaged explain | head -1` does."""
    program = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-m', 'cupaged', 'explain', '--backend', 'reference'"
        "], stdout=subprocess.PIPE, stderr=subprocess.PIPE); "
        "p.stdout.close(); sys.stdout.write(p.stderr.read().decode())"
    )
    done = run_python("-c", program)
    assert (done.returncode, done.stdout) == (0, "")

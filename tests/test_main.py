"""`python -m cupaged`: the main job and that it can fail, `info`, and `explain`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupaged
from cupaged import __main__ as command
from cupaged import cuda, examples, heuristics, independent, info, kernels, mainjob, schedule
from cupaged import explain as explain_room
from cupaged.errors import BackendUnavailableError
from cupaged.explain import explain, finish_times, piece_costs
from cupaged.spec import AttentionSpec, DeviceModel

PARENT = Path(cupaged.__file__).resolve().parent.parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NUM_CASES = 5
TABLE_ROW = re.compile(r"^ +(\d)  +(\d+)  +(\d+)  +(\d+)  +\S+  +\S+  +\S+  (.*)$", re.MULTILINE)


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cupaged", *arguments],
        cwd=PARENT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def check_tables(text: str, places: int) -> None:
    """Ten requests in every case, all right, on so many backends."""
    rows = TABLE_ROW.findall(text)
    assert len(rows) == 10 * NUM_CASES * places
    assert [int(row[0]) for row in rows] == list(range(10)) * NUM_CASES * places
    assert all(re.fullmatch(r"ok( \(\d+ rows see no key\))?", row[4]) for row in rows)


# The main job.


def test_the_main_job_without_a_gpu() -> None:
    done = run_module("--seed", "192", **NO_GPU)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    check_tables(done.stdout, 1)
    lines = done.stdout.splitlines()
    assert "reference backend on the host" in lines[1]
    assert re.match("not on a GPU: .*(install|host arrays)", lines[2])
    for title in (
        "issue 192:",
        "no prefix:",
        "nothing appended",
        "lengths on a page's edge:",
        "keys not appended",
    ):
        assert sum(line.startswith(title) for line in lines) == 1
    assert lines[-1].startswith("PASSED: 50 requests on: reference backend on the host")
    warned = [line for line in lines if line.startswith("CupagedWarning: ")]
    assert len(warned) == 1
    assert "see no key" in warned[0]


@pytest.mark.gpu
def test_the_main_job_on_the_gpu_and_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main([])
    text = capsys.readouterr().out
    assert status == 0, text
    check_tables(text, 2)
    assert "cuda backend on cuda:" in text.splitlines()[-1]
    assert "reference backend on the host" in text.splitlines()[-1]


@pytest.mark.gpu
def test_the_main_job_on_the_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--backend", "cuda"]) == 0
    text = capsys.readouterr().out
    check_tables(text, 1)
    assert "reference" not in text


def test_a_seed_repeats_the_lengths_and_another_changes_them(
    one_case: None, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("5", "5", "6"):
        assert command.main(["--backend", "reference", "--seed", seed]) == 0
        texts.append(TABLE_ROW.findall(capsys.readouterr().out))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("arguments", [(), ("explain",)])
def test_no_gpu_where_cuda_is_asked_for(arguments: tuple[str, ...]) -> None:
    done = run_module(*arguments, "--backend", "cuda", **NO_GPU)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"cupaged: .*(install|host arrays).*\n", done.stderr)


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 192's batch alone."""
    every = mainjob.cases
    monkeypatch.setattr(mainjob, "cases", lambda rng: [next(every(rng))])


@pytest.fixture
def last_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case of the keys that were not appended, alone."""
    every = mainjob.cases
    monkeypatch.setattr(mainjob, "cases", lambda rng: list(every(rng))[-1:])


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Let `change` alter what the library computed, or the warnings that it gave."""
    honest = mainjob.run

    def run(case: Any, inputs: Any, backend: Any) -> Any:
        out, lse, warned = honest(case, inputs, backend)
        change(case, out, lse, warned)
        return out, lse, warned

    monkeypatch.setattr(mainjob, "run", run)


def check_failure(capsys: pytest.CaptureFixture[str], faults: dict[int | None, str]) -> None:
    """The job fails, for these requests (None: for the case) and with these words, alone."""
    assert command.main(["--backend", "reference"]) == 1
    text = capsys.readouterr().out
    found = {int(row[0]): row[4] for row in TABLE_ROW.findall(text) if not row[4].startswith("ok")}
    for request, words in faults.items():
        if request is None:
            assert f"\nWRONG: {words}" in text
        else:
            assert found.pop(request).startswith(f"WRONG: {words}")
    assert not found
    assert text.splitlines()[-1].startswith(f"FAILED: {len(faults)} faults in 10 requests on: ")


def add(amount: float, to: str) -> Callable[..., None]:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        {"out": out[-1, 3], "lse": lse[-1]}[to][..., 5] += amount

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add(0.02, "out"), "output"),
        (add(-0.02, "out"), "output"),
        (add(np.nan, "out"), "output"),
        (add(np.inf, "out"), "output"),
        (add(2e-3, "lse"), "LSE"),
        (add(np.nan, "lse"), "LSE"),
        (add(-np.inf, "lse"), "LSE"),
    ],
)
@pytest.mark.usefixtures("one_case")
def test_a_wrong_value_fails_its_request(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[..., None],
    words: str,
) -> None:
    spoil(monkeypatch, change)
    check_failure(capsys, {9: words})


@pytest.mark.parametrize("value", [np.float16(1e-7), np.float16(np.nan)])
@pytest.mark.usefixtures("last_case")
def test_a_row_without_keys_must_be_exactly_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: np.float16
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        out[-1, 0, 0] = value  # request 9 has no key at all
        out[case.batch.qo_indptr[2], 7, 1] = value

    spoil(monkeypatch, change)
    assert command.main(["--backend", "reference"]) == 1
    rows = TABLE_ROW.findall(capsys.readouterr().out)
    faults = {int(row[0]): row[4] for row in rows if row[4].startswith("WRONG")}
    assert faults.keys() == {2, 9}
    assert all("rows that see no key" in words for words in faults.values())


@pytest.mark.usefixtures("last_case")
def test_a_row_without_keys_must_have_an_lse_of_minus_infinity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        lse[0, 2] = -1e30  # request 0 has more queries than keys

    spoil(monkeypatch, change)
    check_failure(capsys, {0: "rows that see no key"})


@pytest.mark.parametrize("left", [[], ["the first rows are odd"], ["rows see no key, will be 0"]])
@pytest.mark.usefixtures("last_case")
def test_missing_keys_must_be_warned_of_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: list[str]
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: list[str]) -> None:
        warned[:] = left

    spoil(monkeypatch, change)
    check_failure(capsys, {None: "expected a CupagedWarning that says 'see no key', 'will be 0', "})


@pytest.mark.usefixtures("one_case")
def test_a_warning_without_cause_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda case, out, lse, warned: warned.append("see no key"))
    check_failure(capsys, {None: "unexpected warning: see no key"})


def give_two_requests_each_others_page(arguments: dict[str, Any]) -> None:
    places = arguments["paged_kv_indptr"][[2, 7]]
    arguments["paged_kv_indices"][places] = arguments["paged_kv_indices"][places[::-1]]


@pytest.mark.parametrize(
    ("change", "requests"),
    [
        (lambda arguments: arguments.update(causal=False), range(10)),
        (lambda arguments: arguments.update(sm_scale=0.1), range(10)),
        (give_two_requests_each_others_page, [2, 7]),
    ],
    ids=["not causal", "another scale", "two pages of two requests swapped"],
)
@pytest.mark.usefixtures("one_case")
def test_a_wrong_plan_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    requests: Any,
) -> None:
    honest = cupaged.BatchPrefillWithPagedKVCacheWrapper.plan

    def plan(self: Any, **arguments: Any) -> None:
        change(arguments)
        honest(self, **arguments)

    monkeypatch.setattr(cupaged.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    check_failure(capsys, dict.fromkeys(requests, "output"))


@pytest.mark.usefixtures("one_case")
def test_an_output_that_is_not_written_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        cupaged.BatchPrefillWithPagedKVCacheWrapper, "run", lambda *args, **options: None
    )
    check_failure(capsys, dict.fromkeys(range(10), "output, LSE"))


# What the main job computes with.


def test_the_cases_are_what_they_say(rng: np.random.Generator) -> None:
    for _ in range(20):
        issue, no_prefix, no_append, edge, missing = mainjob.cases(rng)
        assert len(issue.prefix) == 10
        for lengths in (issue.prefix, issue.append):
            assert lengths.min() >= 16
            assert lengths.max() <= 128
        assert not no_prefix.prefix.any()
        assert no_prefix.append.all()
        assert np.flatnonzero(no_append.append == 0).tolist() == [0, 3, 6, 9]
        assert no_append.batch.pages[0] == 0
        assert no_append.batch.pages[1:].all()
        assert set(edge.batch.kv_len % 32) == {31, 0, 1}
        assert edge.prefix.min() > 0
        few = missing.batch.qo_len > missing.batch.kv_len
        assert few.tolist() == [True, False] * 4 + [True, True]
        assert missing.batch.kv_len[9] == 0
        for case in (issue, no_prefix, no_append, edge):
            assert (case.batch.kv_len == case.prefix + case.append).all()
        assert (missing.batch.kv_len == missing.prefix).all()


def test_both_ends_of_the_range_are_drawn(rng: np.random.Generator) -> None:
    assert set(examples.draw_lengths(rng, 2000, (3, 6))) == {3, 4, 5, 6}


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_the_pages_hold_the_keys_and_nothing_else(rng: np.random.Generator, index: int) -> None:
    case = list(mainjob.cases(rng))[index]
    inputs = mainjob.make_inputs(case, rng)
    batch = case.batch
    assert inputs.k_cache.shape == inputs.v_cache.shape == (640, 32, 8, 128)
    assert len(set(inputs.page_indices.tolist())) == batch.pages.sum() == len(inputs.page_indices)
    for cache, contiguous in ((inputs.k_cache, inputs.k), (inputs.v_cache, inputs.v)):
        assert np.count_nonzero(~np.isnan(cache)) == contiguous.size
        begin = 0
        for r, kv_len in enumerate(batch.kv_len.tolist()):
            first = batch.paged_kv_indptr[r]
            for j in range(kv_len):
                page = inputs.page_indices[first + j // 32]
                assert (cache[page, j % 32] == contiguous[begin + j]).all()
            begin += kv_len
        assert begin == len(contiguous)


def test_the_independent_computation_agrees_with_the_oracle(rng: np.random.Generator) -> None:
    qo_len, kv_len = np.array([3, 0, 5, 1, 4, 2, 33]), np.array([7, 4, 2, 1, 0, 2, 40])
    q = rng.standard_normal((qo_len.sum(), 2, 16)).astype(np.float16)
    k, v = (rng.standard_normal((kv_len.sum(), 2, 16)).astype(np.float16) for _ in range(2))
    expected = independent.attention(qo_len, kv_len, q, k, v)
    q_begin = k_begin = 0
    for rows, keys in zip(qo_len.tolist(), kv_len.tolist(), strict=True):
        own, seen = slice(q_begin, q_begin + rows), slice(k_begin, k_begin + keys)
        q_begin, k_begin = q_begin + rows, k_begin + keys
        if rows == 0:
            continue
        formula = oracle.Formula(causal=True)
        out, lse = oracle.attend(q[own], k[seen], v[seen], formula)
        plain = oracle.plain_same_dtype(q[own], k[seen], v[seen], formula)
        np.testing.assert_allclose(expected.out[own], out, rtol=0, atol=1e-12)
        np.testing.assert_allclose(expected.lse[own], lse, rtol=0, atol=1e-12)
        np.testing.assert_allclose(expected.plain[own], plain.astype(np.float64), atol=2e-3)
    assert (q_begin, k_begin) == (len(q), len(k))


# info


class Runtime:
    """CUDA's runtime as CuPy shows it, on a machine of one's wishes."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def getDeviceCount(self) -> int:  # noqa: N802
        return len(self.capabilities)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        major, minor = self.capabilities[device]
        return {
            "name": f"GPU number {device}".encode(),
            "major": major,
            "minor": minor,
            "multiProcessorCount": 7 + device,
            "totalGlobalMem": (3 + device) << 30,
        }


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    module = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime(*capabilities)))
    monkeypatch.setattr(cuda, "cupy", lambda: module)


def test_info_without_a_gpu(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    done = run_module("info", CUPAGED_CACHE_DIR=str(tmp_path), **NO_GPU)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\S+(?: \S+)?) {2,}(.*)$", done.stdout, re.MULTILINE))
    assert found["cupaged"] == cupaged.__version__
    assert found["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["NumPy"] == np.__version__
    assert {"ml_dtypes", "CuPy", "NVRTC", "PyTorch", "JAX"} <= found.keys()
    assert re.match("unavailable: .*(install|host arrays)", found["CUDA backend"])
    assert found["cache folder"] == f"{tmp_path} (usable)"
    assert found["kernels"].startswith("not looked for")


def test_info_without_cupy_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['cupy'] = None\n"
        "from cupaged.__main__ import main; sys.exit(main(['info']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PARENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^CUDA backend +unavailable: .*pip install 'cupaged\[", done.stdout, re.MULTILINE
    )
    assert "NVRTC         not loaded" in done.stdout


def test_info_imports_no_framework() -> None:
    script = (
        "import sys; from cupaged.info import info; info()\n"
        "print({'torch', 'jax'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PARENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_info_lists_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5), (6, 1))
    text = info.info()
    assert "cuda:0        GPU number 0, compute capability 7.5, 7 SMs, 3.0 GiB; too old" in text
    assert "cuda:1        GPU number 1, compute capability 6.1, 8 SMs, 4.0 GiB; too old" in text
    assert "kernels       not looked for" in text


def test_info_counts_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="compiling needs CuPy and NVRTC")
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path))
    pretend(monkeypatch, (8, 0), (9, 0), (9, 0))
    every = list(kernels.configurations(90))
    kernels.cubin_path(every[0], 90)
    lines = info.info().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("kernels"))
    assert re.match(f"kernels +0 of {len(every)} compiled for sm_80;", lines[begin])
    assert re.match(f"kernels +1 of {len(every)} compiled for sm_90a;", lines[begin + 1])
    assert [line.strip() for line in lines[begin + 2 :]] == [every[0].name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
def test_info_tells_of_a_cache_that_others_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path))
    assert f"{tmp_path} (not usable: " in info.info()


@pytest.mark.gpu
def test_info_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^cuda:0 .* compute capability \d+\.\d, \d+ SMs, [\d.]+ GiB$", text, re.MULTILINE
    )
    assert re.search(r"^CUDA driver +\d+\.\d$", text, re.MULTILINE)
    assert re.search(r"^kernels +\d+ of \d+ compiled for sm_", text, re.MULTILINE)


# explain


def build(
    qo_len: list[int],
    kv_len: list[int],
    *,
    heads: tuple[int, int] = (8, 2),
    page_size: int = 16,
    causal: bool = True,
    num_sms: int = 132,
    **options: Any,
) -> schedule.Schedule:
    qo, kv = np.array(qo_len, np.int32), np.array(kv_len, np.int32)
    spec = AttentionSpec(*heads, 128, page_size, causal, 0.1, "float16", "NHD")
    lengths = schedule.Lengths(
        np.concatenate([[0], qo.cumsum()]).astype(np.int32),
        np.concatenate([[0], (-(-kv // page_size)).cumsum()]).astype(np.int32),
        qo,
        kv,
    )
    return schedule.build(spec, lengths, DeviceModel(num_sms, 90), **options)


def walk(costs: list[int], grid: int) -> list[int]:
    """The grid clock tick by clock tick: who has nothing left to do takes the next piece."""
    left, finish = [0] * grid, [0] * grid
    queue = list(costs)
    now = 0
    while queue or any(left):
        for block in range(grid):
            if left[block] == 0 and queue:
                left[block] = queue.pop(0)
        now += 1
        for block in range(grid):
            if left[block]:
                left[block] -= 1
                finish[block] = now
    return sorted(finish)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_finish_times_are_those_of_a_walk(costs: list[int], grid: int) -> None:
    times = finish_times(np.array(costs, np.float64), grid)
    assert times.tolist() == walk(costs, grid)
    assert times.sum() == sum(costs)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 9))
def test_evenly_shared_pieces_change_little(costs: list[int], grid: int) -> None:
    costs.sort(reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_room, "MAX_SIMULATED", 20)
        times = finish_times(np.array(costs, np.float64), grid)
    assert times.sum() == pytest.approx(sum(costs))
    assert abs(times[-1] - walk(costs, grid)[-1]) <= costs[0]
    if len(costs) <= max(20, grid):
        assert times.tolist() == walk(costs, grid)


SCHEDULES = {
    "short and long": ([1, 700, 1, 0], [90000, 3000, 9, 5], {}),
    "one wave": ([40, 100, 7], [100, 128, 65], {"heads": (2, 2)}),
    "fixed splits": ([1, 40], [1000, 700], {"fixed_split_size": 3}),
    "no splits": ([1, 40], [9000, 700], {"disable_split_kv": True}),
    "full": ([300], [20000], {"causal": False, "heads": (3, 1)}),
    "rows without keys": ([50, 40], [20, 0], {}),
}


@pytest.fixture(params=SCHEDULES, ids=lambda name: name.replace(" ", "-"))
def planned(request: pytest.FixtureRequest) -> schedule.Schedule:
    qo_len, kv_len, options = SCHEDULES[request.param]
    return build(qo_len, kv_len, **options)


def test_a_piece_costs_its_tiles_and_its_overhead(planned: schedule.Schedule) -> None:
    for launch in planned.launches:
        costs = iter(piece_costs(launch, planned.spec.num_kv_heads).tolist())
        for item in launch.items:
            tiles = len(range(item["kv_begin"], item["kv_end"], launch.config.cta_tile_kv))
            split = heuristics.SPLIT_COST if item["num_splits"] > 1 else 0
            for _ in range(planned.spec.num_kv_heads):
                assert next(costs) == tiles + heuristics.ITEM_COST + split
        assert next(costs, None) is None


def sections(text: str) -> Iterator[dict[str, str]]:
    """The labelled lines of each launch."""
    for part in text.split("\n\n")[1:]:
        yield dict(re.findall(r"^  (\w+) +(.*)$", part, re.MULTILINE))


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_the_text_says_what_the_plan_is(planned: schedule.Schedule) -> None:
    text = explain(planned)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert f"workspace {planned.workspace_bytes:,} bytes" in text
    seen = sum(
        int(oracle.visible(qo, kv, planned.spec.causal).sum())
        for qo, kv in zip(planned.lengths.qo_len, planned.lengths.kv_len, strict=True)
    )
    assert f"{seen:,} visible (query, key) pairs a head" in text
    found = list(sections(text))
    assert len(found) == len(planned.launches)
    for section, launch in zip(found, planned.launches, strict=True):
        assert f": {launch.config.name}\n" in text
        config, heads = launch.config, planned.spec.num_kv_heads
        assert numbers(section["tile"])[:3] == [
            config.cta_tile_q,
            config.cta_tile_kv,
            config.num_threads,
        ]
        tiles = Counter((int(i["request"]), int(i["row_begin"])) for i in launch.items)
        items = numbers(section["items"])
        assert items[:2] == [len(launch.items), len(tiles)]
        assert items[-2:] == [heads, heads * len(launch.items)]
        rows = sum(
            min(
                int(planned.lengths.qo_len[r]) * planned.spec.gqa_group_size - row,
                config.cta_tile_q,
            )
            for r, row in tiles
        )
        assert items[2] == round(100 * rows / (len(tiles) * config.cta_tile_q))
        split = [count for count in tiles.values() if count > 1]
        if split:
            words = numbers(section["splits"])
            assert words[:2] == [len(split), len(tiles)]
            assert words[2] == min(split)
            assert words[-2:] == [sum(split), config.cta_tile_q]
        else:
            assert section["splits"] == "none"
        assert numbers(section["grid"])[:2] == [launch.grid, config.ctas_per_sm * 132]
        costs = piece_costs(launch, heads)
        last, mean, imbalance, full = numbers(section["finish"])
        assert last == walk([int(c) for c in costs], launch.grid)[-1]
        assert mean == pytest.approx(costs.sum() / launch.grid, abs=0.051)
        assert imbalance == pytest.approx(last / (costs.sum() / launch.grid), abs=0.0051)
        assert full == pytest.approx(
            100 * costs.sum() / (last * config.ctas_per_sm * 132), abs=0.51
        )
        assert numbers(section["work"])[-1] == costs.max()


def test_the_picture_counts_every_thread_block(planned: schedule.Schedule) -> None:
    text = explain(planned)
    bars = [
        re.findall(r"^ +[\d.,]+ \|(#*) +(\d+)$", part, re.MULTILINE)
        for part in text.split("\n\n")[1:]
    ]
    for rows, launch in zip(bars, planned.launches, strict=True):
        assert 1 <= len(rows) <= 8
        counts = [int(count) for _, count in rows]
        assert sum(counts) == launch.grid
        assert all(bool(bar) == (count != "0") for bar, count in rows)
        longest = counts.index(max(counts))
        assert len(rows[longest][0]) == 48


def test_the_text_names_the_shape_and_why() -> None:
    mixed = explain(build([1, 700], [90000, 3000]))
    assert (
        "rows: for requests of at most 32 (queries x group): reading K and V bounds them" in mixed
    )
    assert "rows: for requests of more than 32 (queries x group); 32 rows a warp," in mixed
    assert "ride along" not in mixed
    assert "2 shorter requests ride along" in explain(build([2000, 4, 4], [2000, 60, 60]))


@pytest.mark.parametrize(("qo_len", "kv_len"), [([], []), ([0, 0], [7, 0])])
def test_a_plan_without_rows(qo_len: list[int], kv_len: list[int]) -> None:
    text = explain(build(qo_len, kv_len))
    assert text.startswith(f"batch of {len(qo_len)} requests")
    assert text.endswith("\n\nno query rows: nothing is launched")


def test_sums_beyond_31_bits() -> None:
    text = explain(build([65536, 65536], [65536, 131072], causal=False))
    assert f"{3 * 2**32:,} visible (query, key) pairs a head, 52,776.56 GFLOP" in text


def test_ten_thousand_items() -> None:
    text = explain(build([1280] * 500, [4096] * 500, heads=(16, 16)))
    (section,) = sections(text)
    assert numbers(section["items"])[:2] == [5000, 5000]
    assert numbers(section["items"])[-1] == 80000


def test_wrapper_explains_its_plan() -> None:
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
    with pytest.raises(RuntimeError, match="before plan"):
        wrapper.explain()
    batch = examples.mixed()
    wrapper.plan(**batch.plan_arguments(np.arange(batch.pages.sum(), dtype=np.int32)))
    assert wrapper.explain().startswith("batch of 64 requests, causal attention, float16\n")


# explain as a command


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


# Which backends run.


def test_backends_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDevice=lambda: 0)
    module = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda, "cupy", lambda: module)
    monkeypatch.setattr(cuda, "device_model", lambda device: DeviceModel(132, 90))
    assert mainjob.choose_backends("auto") == (("cuda", "reference"), "")
    assert mainjob.choose_backends("cuda") == (("cuda",), "")
    assert mainjob.choose_backends("reference") == (("reference",), "")


def test_backends_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendUnavailableError("install a GPU")

    monkeypatch.setattr(cuda, "cupy", missing)
    assert mainjob.choose_backends("auto") == (("reference",), "install a GPU")
    assert mainjob.choose_backends("reference") == (("reference",), "")
    with pytest.raises(BackendUnavailableError, match="install a GPU"):
        mainjob.choose_backends("cuda")

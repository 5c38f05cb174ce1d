"""Pages that a request has twice, looked for by the GPU while the host plans."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_calls import spinner

import cupaged
from cupaged import device_pages, devices, kernels
from cupaged.device_pages import KERNEL, DevicePages, Question, worth_asking

#: As many entries as the GPU is asked about.
MANY = 13_000


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_compiles(arch: int) -> None:
    _, log = kernels.compile_cubin(KERNEL, arch, ("--ptxas-options=-v",))
    assert "0 bytes spill stores" in log
    assert "warning" not in log


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> device_pages._Answers:
    """Room for answers, in plain memory."""

    class Memory(np.ndarray[Any, Any]):
        ptr = 1000

    cuda = SimpleNamespace(alloc_pinned_memory=lambda size: np.ones(size, np.uint8).view(Memory))
    monkeypatch.setattr(device_pages, "cupy", lambda: SimpleNamespace(cuda=cuda))
    return device_pages._Answers()


def test_questions_have_answers_and_numbers_of_their_own(answers: device_pages._Answers) -> None:
    first, words, number = answers.take(3)
    second, others, next_number = answers.take(5)
    assert (second, next_number) == (first + 12, number + 1)
    words[:] = number
    assert (words == number).all()
    assert not (others == next_number).any()  # zeros are nobody's answer
    assert not np.shares_memory(words, others)


def test_room_for_answers_is_used_again(answers: device_pages._Answers) -> None:
    begin, words, number = answers.take(40_000)
    words[:] = number
    again, others, next_number = answers.take(40_000)
    assert again == begin
    # What is there is an answer to another question.
    assert not (others == next_number).any()


def test_an_answer_is_waited_for_as_long_as_it_is_worth(
    answers: device_pages._Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_pages, "_answers", lambda: answers)
    clock = iter(range(100))
    monkeypatch.setattr(device_pages.time, "perf_counter", lambda: float(next(clock)))
    assert not Question(1, 2, 5, 9, patience=3.0).is_denied()
    assert next(clock) == 4  # asked for the end, and thrice in vain
    asked = Question(1, 2, 5, 9, patience=50.0)
    asked._words[2] = ~np.uint32(asked._number)
    assert not asked.is_denied()
    assert next(clock) == 7  # the answer is there, and nobody waits
    asked._words[:] = asked._number
    assert asked.is_denied()
    assert asked.parameters == (1, 2, 1000 + 4 * 5, asked._number, 1)


def test_numbers_begin_again(answers: device_pages._Answers) -> None:
    answers._number = 2**31 - 2
    assert [answers.take(1)[2] for _ in range(3)] == [2**31 - 1, 1, 2]


def table(
    rng: np.random.Generator, batch: int, entries: int, shared: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pages of requests that have none twice, all of them with the same first ones, and indptr."""
    cuts = np.sort(rng.integers(0, entries - batch * shared + 1, batch - 1))
    lengths = np.diff(cuts, prepend=0, append=entries - batch * shared)
    order = rng.permutation(2 * entries).astype(np.int32)
    prefix, rest = order[:shared], order[shared:]
    pages = [np.concatenate([prefix, part]) for part in np.split(rest[: lengths.sum()], cuts)]
    indptr = np.cumsum([0, *map(len, pages)], dtype=np.int32)
    return np.concatenate(pages), indptr


def repeat_one(rng: np.random.Generator, pages: np.ndarray, indptr: np.ndarray) -> None:
    """Let a request have one of its pages twice."""
    lengths = np.diff(indptr)
    request = rng.choice(np.flatnonzero(lengths > 1))
    one, other = indptr[request] + rng.choice(lengths[request], 2, replace=False)
    pages[one] = pages[other]


def found_to_differ(cp: Any, pages: np.ndarray, indptr: np.ndarray) -> bool:
    """What the GPU says, given all the time that it takes."""
    highest = int(pages.max())
    assert worth_asking(pages, indptr, highest)
    asked = DevicePages(pages, indptr, highest, 0)
    cp.cuda.Device().synchronize()
    return asked.question.is_denied()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 64, 3000])
@pytest.mark.parametrize("shared", [0, 1])
def test_repeats_are_found(cp: Any, rng: np.random.Generator, batch: int, shared: int) -> None:
    for _ in range(20):
        pages, indptr = table(rng, batch, MANY + int(rng.integers(MANY)), shared)
        assert found_to_differ(cp, pages, indptr)
        repeat_one(rng, pages, indptr)
        assert not found_to_differ(cp, pages, indptr)


def test_what_the_gpu_is_not_asked(rng: np.random.Generator) -> None:
    """Few pages, pages with numbers beyond a block's shared memory, and too many requests."""
    limit = KERNEL.shared_bytes * 8
    pages, indptr = table(rng, 8, 100)
    assert not worth_asking(pages, indptr, limit - 1)
    pages, indptr = table(rng, 8, MANY)
    assert worth_asking(pages, indptr, limit - 1)
    assert not worth_asking(pages, indptr, limit)
    assert worth_asking(pages, np.zeros(1 << 16, np.int32), limit - 1)
    assert not worth_asking(pages, np.zeros((1 << 16) + 1, np.int32), limit - 1)


@pytest.mark.gpu
def test_the_highest_page_number_has_a_bit_too(cp: Any, rng: np.random.Generator) -> None:
    pages, indptr = table(rng, 1, MANY)
    pages[17] = KERNEL.shared_bytes * 8 - 1
    assert found_to_differ(cp, pages, indptr)
    pages[-1] = pages[17]
    assert not found_to_differ(cp, pages, indptr)


def warnings_of_plan(pages: np.ndarray, indptr: np.ndarray, backend: str) -> list[str]:
    batch = len(indptr) - 1
    wrapper = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend=backend)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        wrapper.plan(indptr, pages, (np.diff(indptr) > 0).astype(np.int32), 8, 8, 64, 16)
    assert all(each.filename == __file__ for each in found)
    assert len(wrapper._plan.schedule.lengths.kv_len) == batch
    return [str(each.message) for each in found]


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [False, True])
def test_plans_warn_alike(cp: Any, rng: np.random.Generator, busy: bool) -> None:
    """Whoever looked: the host, the GPU, or the host because the GPU was busy."""
    spin = spinner(cp)
    for _ in range(10):
        pages, indptr = table(rng, 50, MANY, shared=3)
        for mistake in (False, True):
            if mistake:
                repeat_one(rng, pages, indptr)
            expected = warnings_of_plan(pages, indptr, "reference")
            assert len(expected) == mistake
            if busy:
                spin()
            assert warnings_of_plan(pages, indptr, "cuda") == expected
    devices.cupy().cuda.Device().synchronize()

"""Sources as they are rendered for the compiler."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from compiler import plain_kernel

from cupaged import kernels, source, tiles
from cupaged.kernel_spec import DEVICE_STRUCTS, KernelConfig
from cupaged.spec import SERVED_DTYPES, SERVED_HEAD_DIMS, Needs

pytestmark = pytest.mark.usefixtures("nothing_remembered")

CONFIG = plain_kernel(90, "float16", 128, 16)
OTHER = plain_kernel(90, "bfloat16", 128, 16)
FAMILIES = {config.family: config for config in (CONFIG, plain_kernel(80, "float16", 128, 16))}


@pytest.fixture(params=["prefill_sm80", "prefill_sm90"])
def config(request: pytest.FixtureRequest) -> KernelConfig:
    """One of each family of kernels."""
    return FAMILIES[request.param]


def test_a_rendered_source_is_whole(config: KernelConfig) -> None:
    """One text, with no file left to include and every header in it once."""
    text = source.render(config)
    assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)
    for header in source.folder().glob("*.cuh"):
        begins = re.findall(rf'^#line 1 "{header.name}"$', text, re.MULTILINE)
        assert len(begins) <= 1, header.name
    assert f'#line 1 "{config.family}.cu"' in text
    assert "__global__" in text
    assert CONFIG.entry in text


def test_line_directives_point_at_the_real_lines(config: KernelConfig) -> None:
    """Whatever the compiler says of a line is found there in the file that it names."""
    name, number = "", 0
    checked = 0
    for line in source.render(config).splitlines():
        directive = re.match(r'^#line (\d+) "(.+)"$', line)
        if directive:
            number, name = int(directive[1]), directive[2]
            continue
        if name and line.strip() and not line.startswith("static_assert(sizeof"):
            original = (source.folder() / name).read_text().splitlines()
            if number <= len(original):
                assert line == original[number - 1], f"{name}:{number}"
                checked += 1
        number += 1
    assert checked > 300


def test_constants_of_a_configuration_are_in_its_prologue() -> None:
    text = source.prologue(CONFIG)
    for constant in (
        "constexpr int HEAD_DIM_QK = 128;",
        f"constexpr int CTA_TILE_Q = {CONFIG.cta_tile_q};",
        f"constexpr int CTA_TILE_KV = {CONFIG.cta_tile_kv};",
        f"constexpr int NUM_THREADS = {CONFIG.num_threads};",
        f"constexpr int NUM_Q_STAGES = {CONFIG.num_q_stages};",
        f"constexpr int SHARED_BYTES = {CONFIG.shared_bytes};",
        "#define CUPAGED_PAGE_ALIGNED 1",
        "#define CUPAGED_BFLOAT16 0",
    ):
        assert constant in text
    assert "#define CUPAGED_BFLOAT16 1" in source.prologue(OTHER)
    by_key = plain_kernel(90, "float16", 128, 1)
    assert "#define CUPAGED_PAGE_ALIGNED 0" in source.prologue(by_key)


def test_device_structs_are_checked_field_by_field() -> None:
    text = source.layout_checks(CONFIG)
    for struct, dtype in DEVICE_STRUCTS.items():
        assert f"static_assert(sizeof({struct}) == {dtype.itemsize});" in text
        for field in dtype.names:
            assert f"{struct}*)0)->{field}))" in text


def test_missing_sources_say_where_they_were_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "cupaged"
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    with pytest.raises(FileNotFoundError) as raised:
        source.folder()
    assert str(raised.value) == (
        f"cupaged's CUDA sources are missing: looked for {package / 'kernels_cu'} and "
        f"{tmp_path / 'kernels_cu'}; reinstall cupaged"
    )


def test_sources_inside_the_package_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "cupaged"
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    for folder in (package / "kernels_cu", tmp_path / "kernels_cu"):
        folder.mkdir(parents=True)
    assert source.folder() == package / "kernels_cu"


@pytest.mark.parametrize("arch", [*sorted(tiles._CLASS), 130])
def test_configurations_fit_their_architecture(arch: int) -> None:
    configs = list(kernels.configurations(arch))
    assert len({config.name for config in configs}) == len(set(configs)) == len(configs)
    for page_size in range(1, 70):
        for dtype, head_dims in itertools.product(SERVED_DTYPES, SERVED_HEAD_DIMS):
            for shape in tiles.SHAPES:
                needs = Needs(dtype, dtype, *head_dims, page_size)
                chosen = tiles.kernel_config(arch, needs, shape)
                assert chosen in configs
                assert chosen.page_aligned == (page_size % chosen.page_unit == 0)
                warpgroups = shape != "short" and arch == 90
                assert chosen.family == ("prefill_sm90" if warpgroups else "prefill_sm80")
    limit = tiles.SHARED_LIMIT[tiles.tile_class(arch)]
    for config in configs:
        assert config.shared_bytes <= limit
        assert config.num_threads <= 1024
        assert config.cta_tile_q % (16 * config.warps_q) == 0
        assert config.cta_tile_kv % (16 * config.warps_kv) == 0

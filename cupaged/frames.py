"""How much a plan may hold whose launches are recorded in a CUDA graph, and can't grow."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from cupaged.heuristics import most_partials
from cupaged.kernel_spec import KernelConfig
from cupaged.shape_choice import SHORT_MAX_ROWS
from cupaged.spec import AttentionSpec, DeviceModel
from cupaged.tiles import Shape, kernel_config, slots

#: Bytes of partial states of splits that the caller fixes, without a workspace: what FlashInfer
#: recommends for one.
_PARTIAL_BYTES = 128 << 20


class Room(NamedTuple):
    """What fits a launch.

    Attributes
    ----------
    config : KernelConfig
    tiles : int
        Query tiles.
    partials : int
        Partial-state slots.
    """

    config: KernelConfig
    tiles: int
    partials: int

    @property
    def items(self) -> int:
        """Work items: query tiles, and the splits of those that are split."""
        return self.tiles + self.partials

    @property
    def merges(self) -> int:
        """Query tiles that are split: into two at least."""
        return self.partials // 2

    def partial_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of all partial states."""
        return self.partials * bytes_of_a_partial(spec, self.config)


#: The launches of a plan, and what fits each. One alone serves every request.
Frame: TypeAlias = dict[Shape, Room]


def bytes_of_a_partial(spec: AttentionSpec, config: KernelConfig) -> int:
    """Bytes of a partial-state slot: float32, an output row and an LSE for each row and KV head."""
    return spec.num_kv_heads * config.cta_tile_q * (spec.head_dim_vo + 1) * 4


def make_frame(
    spec: AttentionSpec,
    device: DeviceModel,
    max_batch: int,
    max_rows: int,
    max_pages: int,
    equal_rows: int | None,
    splits: tuple[int | None, bool],
    workspace_bytes: int | None,
) -> Frame:
    """The launches for any batch of at most so many requests, rows of q, and pages.

    Parameters
    ----------
    spec : AttentionSpec
    device : DeviceModel
    max_batch, max_rows, max_pages : int
    equal_rows : int, optional
        Rows of q that every request has.
    splits : tuple
        `fixed_split_size` and `disable_split_kv`.
    workspace_bytes : int, optional
        Of the caller's workspace.
    """
    fixed_split_size, disable_split_kv = splits
    group = spec.gqa_group_size
    shapes: tuple[Shape, ...]
    if equal_rows is not None:
        shapes = ("short",) if equal_rows * group <= SHORT_MAX_ROWS else ("long",)
    elif fixed_split_size is not None or disable_split_kv:
        shapes = ("long", "short")
    else:
        shapes = ("long",)
    frame: Frame = {}
    for shape in shapes:
        config = kernel_config(device.arch, spec.needs, shape)
        if equal_rows is None:
            tiles = max_rows * group // config.cta_tile_q + max_batch
        else:
            tiles_each = -(-equal_rows * group // config.cta_tile_q)
            tiles = max_batch * tiles_each
        size = bytes_of_a_partial(spec, config)
        if disable_split_kv:
            partials = 0
        elif fixed_split_size is None:
            partials = most_partials(slots(config, device), spec.num_kv_heads)
            if workspace_bytes is not None:
                partials = min(partials, workspace_bytes // size)
        else:
            partials = (_PARTIAL_BYTES if workspace_bytes is None else workspace_bytes) // size
            if equal_rows is not None:
                # A request of p pages has p / fixed_split_size splits, rounded up.
                partials = min(partials, tiles + tiles_each * (max_pages // fixed_split_size))
        frame[shape] = Room(config, tiles, partials)
    return frame

// Brings tiles of K and V from their pages into the ring, by boxes of the copy engine or row by row.
//
// They come last tile first, so that the tiles that need masks, and the one that is not whole, come
// while the pipeline fills. K runs one tile ahead of V.
//
// Where a window hides keys from all rows of the query tile, and past the end, tiles hold something
// else, zeros or a key that is seen: a weight of 0 times what lies there is not 0 where that is NaN.
#pragma once
#include "pipeline_sm90.cuh"
#include "policy.cuh"

// The first key that a window shows a row of the query tile.
__device__ __forceinline__ int first_seen_key(const Params& p, const Work& work) {
    return Visibility(p, work).kv_begin(RowMap(p, work).query(0));
}

// Lanes that copy a row: one a chunk where that is a power of two and the same for K and V, else
// they copy panel by panel.
constexpr bool WHOLE_ROWS =
    KTile::CHUNKS == VTile::CHUNKS && (KTile::CHUNKS & (KTile::CHUNKS - 1)) == 0;
constexpr int ROW_LANES = WHOLE_ROWS ? KTile::CHUNKS : PANEL_CHUNKS;
constexpr int ROWS_PER_PASS = WARP_SIZE / ROW_LANES;

// Copying rows: WARPS warps take ROWS_PER_PASS neighbouring rows each in every pass, 16 bytes a
// lane at a time. Each lane finds the place of one of its warp's rows, this one of those to copy.
template <int WARPS>
__device__ __forceinline__ int row_to_find(int warp, int lane) {
    return (lane % ROW_LANES * WARPS + warp) * ROWS_PER_PASS + lane / ROW_LANES;
}

// Starts the copies to a tile, or a part of one that begins at a group. `found` is the place of the
// lane's row_to_find(), in elements from `source`; the lanes that copy a row have it from one of
// them.
template <typename Tile, int WARPS, int PASSES>
__device__ __forceinline__ void copy_rows(u32 tile, const u16* source, i64 found, int warp,
                                          int lane) {
    constexpr int PARTS = Tile::CHUNKS / ROW_LANES;  // of a row: itself, or its panels
    static_assert(PASSES <= ROW_LANES, "a lane finds one row");
    const int chunk = lane % ROW_LANES;
    const i64 bytes = found * 2;
    const char* const begin = reinterpret_cast<const char*>(source + chunk * 8);
    const u32 origin = tile + Tile::offset(warp * ROWS_PER_PASS + lane / ROW_LANES, chunk);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        // The pass's first row and the lane's share in it are different bits of a row.
        const int rows = pass * WARPS * ROWS_PER_PASS;
        const u32 place = Tile::below(origin, rows);
        const char* const row = begin + __shfl_sync(~0u, bytes, pass, ROW_LANES);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            cp_async_16(place + part * PANEL_BYTES, row + part * ROW_LANES * 16, 16);
    }
}

#if CUPAGED_PAGE_ALIGNED
// K and V through tensor maps: a box is neighbouring keys, all in one page. Lane l of warp w has
// box w + l * KV_WARPS of a tile.
struct BoxLoader {
    const Params& p;
    Barriers& barriers;
    u32 tiles;  // of the ring
    const TensorMap *k_map, *v_map;
    int box_rows;  // keys of a box
    int row;       // the first of this lane's box, in a tile
    int k_bytes;   // of the warp's boxes of a tile of K
    int v_bytes;   // and of V
    int warp;
    u32 cut_round;
    PlaceKv at;

    __device__ __forceinline__ BoxLoader(const Params& p, Barriers& barriers, u32 tiles,
                                         const TensorMap* k_map, const TensorMap* v_map, int warp,
                                         int lane)
        : p(p), barriers(barriers), tiles(tiles), k_map(k_map), v_map(v_map),
          box_rows(min(p.page_size & -p.page_size, CTA_TILE_KV & -CTA_TILE_KV)),
          row((warp + lane * KV_WARPS) * box_rows), warp(warp), cut_round(0) {
        const int boxes = CTA_TILE_KV / box_rows;
        const int rows = (boxes + KV_WARPS - 1 - warp) / KV_WARPS * box_rows;
        k_bytes = rows * KTile::BYTES;
        v_bytes = rows * VTile::BYTES;
    }

    // Has the warp's boxes of a tile brought, which its lanes have looked up.
    template <typename Tile>
    __device__ __forceinline__ void copy(const TensorMap* map, u32 tile, int bytes, int panel,
                                         int group, int page, int lane, u32 barrier) {
        if (lane == 0) mbarrier_arrive_expect(barrier, bytes);
        __syncwarp();  // the bytes are announced before any come
        if (row < CTA_TILE_KV)
            copy_box_5d(tile + row * Tile::STRIDE, map, 0, 0, panel, group, page, barrier);
    }

    // Clears the rows of a tile from `first` to `end`.
    template <typename Tile>
    __device__ __forceinline__ void clear(u32 tile, int first, int end, int lane) {
        // Where K is cut as well as V there is no register to keep the lane in.
        const int begin = CUPAGED_SOFT_CAP ? lane_index() : lane;
        for (int i = begin; i < (end - first) * Tile::CHUNKS; i += WARP_SIZE)
            store_zeros(tile + Tile::offset(first + i / Tile::CHUNKS, i % Tile::CHUNKS));
    }

    // Whether the box with a row of a tile is this warp's.
    __device__ __forceinline__ bool has_box(int row) const {
        return row / box_rows % KV_WARPS == warp;
    }

    // As copy(), for a tile whose keys are the rows from `first` to before `end`. In boxes that keys
    // begin or end in the midst of, the other rows become zeros.
    template <typename Tile>
    __device__ __forceinline__ void copy_keys(const TensorMap* map, u32 tile, int bytes, int panel,
                                              int group, int page, int lane, u64* full, int first,
                                              int end) {
        const bool cut_first = CUPAGED_WINDOW && first > 0 && first < CTA_TILE_KV &&
                               first % box_rows != 0 && has_box(first);
        const bool cut_end = end < CTA_TILE_KV && end % box_rows != 0 && has_box(end);
        if (cut_first || cut_end) {
            const u32 come = shared_address(&barriers.cut[warp]);
            copy<Tile>(map, tile, bytes, panel, group, page, lane, come);
            mbarrier_wait(come, cut_round);
            cut_round ^= 1;
            if (cut_first) clear<Tile>(tile, first - first % box_rows, first, lane);
            if (cut_end) clear<Tile>(tile, end, end + box_rows - end % box_rows, lane);
            fence_async_proxy();
            arrive_warp(full, lane);
        } else {
            copy<Tile>(map, tile, bytes, panel, group, page, lane, shared_address(full));
        }
    }

    __device__ __forceinline__ void load(const Work& work, int lane) {
        const Item item = work.item;
        const int page_begin = work.item.page_begin;
        const int k_panel = work.kv_head * static_cast<int>(p.k_stride_head / PANEL);
        const int v_panel = work.kv_head * static_cast<int>(p.v_stride_head / PANEL);
        const int num_tiles = num_kv_tiles(item);
        const int first_seen = CUPAGED_WINDOW ? first_seen_key(p, work) : 0;
        int begin = item.kv_begin + (num_tiles - 1) * CTA_TILE_KV;
        // Where this lane's box of the tile at `begin` lies.
        int page, group;
        const auto look_up = [&] {
            const int key = begin + row;
            page = 0;
            group = p.page_size / 8;  // outside of the tensor: zeros
            if (row < CTA_TILE_KV && key >= item.kv_begin && key < item.kv_end &&
                (!CUPAGED_WINDOW || key + box_rows > first_seen)) {
                const int index = divide(key, p.page_magic, p.page_shift);
                page = p.page_indices[page_begin + index];
                group = (key - index * p.page_size) / 8;
            }
        };
        look_up();
        int last_page = 0, last_group = 0;
        for (int tile = 0; tile <= num_tiles; ++tile) {
            if (tile < num_tiles) {
                wait_empty(barriers.kv_empty, at.stage, at.round);
                const u32 target = tiles + at.stage * TILE_KV_BYTES;
                u64* const full = &barriers.kv_full[at.stage];
                // How products are capped depends on the largest of them: what is behind the window
                // or past the end would show in the bits of others.
                if (CUPAGED_SOFT_CAP)
                    copy_keys<KTile>(k_map, target, k_bytes, k_panel, group, page, lane, full,
                                     first_seen - begin, item.kv_end - begin);
                else
                    copy<KTile>(k_map, target, k_bytes, k_panel, group, page, lane,
                                shared_address(full));
                at.advance();
            }
            const int v_page = last_page, v_group = last_group;
            last_page = page;
            last_group = group;
            begin -= CTA_TILE_KV;
            look_up();
            if (tile > 0) {
                wait_empty(barriers.kv_empty, at.stage, at.round);
                const u32 target = tiles + at.stage * TILE_KV_BYTES;
                u64* const full = &barriers.kv_full[at.stage];
                const int v_begin = item.kv_begin + (num_tiles - tile) * CTA_TILE_KV;
                copy_keys<VTile>(v_map, target, v_bytes, v_panel, v_group, v_page, lane, full,
                                 first_seen - v_begin, item.kv_end - v_begin);
                at.advance();
            }
        }
    }
};
#else
// K and V row by row. Either every warp copies its share of every tile, and the page table is read
// one tile ahead of the copies; or two warps copy the tiles of K and two those of V, half of a tile's
// rows each, and read the page table as they go.
template <bool BY_KIND, int WARPS>
struct RowLoader;

// Keys of an item that a row of the query tile may see.
struct SeenKeys {
    const Item& item;
    int first;

    __device__ __forceinline__ SeenKeys(const Params& p, const Work& work)
        : item(work.item), first(first_seen_key(p, work)) {}

    // The one to copy for a key: itself, or the nearest for those past the end or behind the window,
    // which are masked and weigh nothing.
    __device__ __forceinline__ int nearest(int key) const {
        return min(CUPAGED_WINDOW ? max(key, first) : key, item.kv_end - 1);
    }
};

template <int WARPS>
struct RowLoader<false, WARPS> {
    static constexpr int PASSES = CTA_TILE_KV / (WARPS * ROWS_PER_PASS);
    static_assert(PASSES * WARPS * ROWS_PER_PASS == CTA_TILE_KV, "a tile is whole passes");
    const Params& p;
    Barriers& barriers;
    u32 tiles;  // of the ring
    int warp, lane;
    PlaceKv at;

    __device__ __forceinline__ RowLoader(const Params& p, Barriers& barriers, u32 tiles, int warp,
                                         int lane)
        : p(p), barriers(barriers), tiles(tiles), warp(warp), lane(lane) {}

    // Where a key lies: its page, and its place in it.
    struct Key {
        int page, in_page;
    };

    // Copies the warp's rows of a tile of K or V, and goes on to the next stage.
    template <typename Tile>
    __device__ __forceinline__ void copy(const u16* head, i64 offset) {
        wait_empty(barriers.kv_empty, at.stage, at.round);
        // Where K's places and V's are two, or a window is to be minded, there are no registers to
        // keep them, nor what they come from.
        copy_rows<Tile, WARPS, PASSES>(tiles + at.stage * TILE_KV_BYTES, head, offset, warp,
                                       WHOLE_ROWS && !CUPAGED_WINDOW ? lane : lane_index());
        cp_async_arrive(shared_address(&barriers.kv_full[at.stage]));
        at.advance();
    }

    __device__ __forceinline__ void load(const Work& work) {
        const Item& item = work.item;
        const int num_tiles = num_kv_tiles(item);
        if (num_tiles == 0) return;
        const int* const pages = p.page_indices + work.item.page_begin;
        const u16* const k = p.k + work.kv_head * p.k_stride_head;
        const u16* const v = p.v + work.kv_head * p.v_stride_head;
        const SeenKeys keys(p, work);
        const auto look_up = [&](int tile) {
            const int row = tile * CTA_TILE_KV + row_to_find<WARPS>(warp, lane);
            const int key = keys.nearest(item.kv_begin + row);
            const int index = divide(key, p.page_magic, p.page_shift);
            return Key{pages[index], key - index * p.page_size};
        };
        Key last, now = look_up(num_tiles - 1);
#pragma unroll 1
        for (int tile = num_tiles - 1; tile >= 0; --tile) {
            const Key next = look_up(max(tile - 1, 0));
            copy<KTile>(k, now.page * p.k_stride_page + now.in_page * p.k_stride_token);
            if (tile < num_tiles - 1)
                copy<VTile>(v, last.page * p.v_stride_page + last.in_page * p.v_stride_token);
            last = now;
            now = next;
        }
        copy<VTile>(v, last.page * p.v_stride_page + last.in_page * p.v_stride_token);
    }
};

template <int WARPS>
struct RowLoader<true, WARPS> {
    static constexpr int PASSES = CTA_TILE_KV / (WARPS * ROWS_PER_PASS);
    static constexpr int LOOKUPS = (PASSES + ROW_LANES - 1) / ROW_LANES;  // rows that a lane finds
    static constexpr int LAST_PASSES = PASSES - (LOOKUPS - 1) * ROW_LANES;
    static constexpr int ROWS_A_LOOKUP = ROW_LANES * WARPS * ROWS_PER_PASS;
    static_assert(CTA_TILE_KV % (WARPS * ROWS_PER_PASS) == 0 && ROWS_A_LOOKUP % 8 == 0,
                  "a lookup's rows are whole passes and whole groups");
    const Params& p;
    Barriers& barriers;
    u32 tiles;  // of the ring
    int half;   // of a tile's rows, this warp's
    bool is_v;  // tiles of V are its, else of K
    int lane;
    int filled;  // tiles of the ring that came before this piece of work, modulo two rounds

    __device__ __forceinline__ RowLoader(const Params& p, Barriers& barriers, u32 tiles, int warp,
                                         int lane)
        : p(p), barriers(barriers), tiles(tiles), half(warp / 2), is_v(warp % 2), lane(lane),
          filled(0) {}

    // The place in the ring of the piece's i-th tile, of K or of V.
    __device__ __forceinline__ int place(int i, int num_tiles) const {
        if (is_v) return filled + 2 * i + (i == num_tiles - 1 ? 1 : 2);
        return filled + (i == 0 ? 0 : 2 * i - 1);
    }

    // Where a key's row lies, in elements from the head's first.
    __device__ __forceinline__ i64 offset(const Item& item, int key) const {
        const int index = divide(key, p.page_magic, p.page_shift);
        const int page = p.page_indices[item.page_begin + index];
        const int in_page = key - index * p.page_size;
        return is_v ? page * p.v_stride_page + in_page * p.v_stride_token
                    : page * p.k_stride_page + in_page * p.k_stride_token;
    }

    __device__ __forceinline__ void load(const Work& work) {
        const Item& item = work.item;
        const int num_tiles = num_kv_tiles(item);
        const u16* const head = is_v ? p.v + work.kv_head * p.v_stride_head
                                     : p.k + work.kv_head * p.k_stride_head;
        const SeenKeys keys(p, work);
#pragma unroll 1
        for (int i = 0; i < num_tiles; ++i) {
            const int begin = item.kv_begin + (num_tiles - 1 - i) * CTA_TILE_KV;
            i64 found[LOOKUPS];
#pragma unroll
            for (int j = 0; j < LOOKUPS; ++j) {
                const int row = j * ROWS_A_LOOKUP + row_to_find<WARPS>(half, lane);
                found[j] = offset(item, keys.nearest(begin + row));
            }
            const int at = place(i, num_tiles);
            const int stage = at % NUM_STAGES;
            wait_empty(barriers.kv_empty, stage, at / NUM_STAGES % 2);
            const u32 tile = tiles + stage * TILE_KV_BYTES;
#pragma unroll
            for (int j = 0; j < LOOKUPS; ++j) {
                const u32 part = tile + j * (ROWS_A_LOOKUP / 8 * KTile::GROUP_BYTES);
                if (j < LOOKUPS - 1)
                    copy_rows<KTile, WARPS, ROW_LANES>(part, head, found[j], half, lane);
                else
                    copy_rows<KTile, WARPS, LAST_PASSES>(part, head, found[j], half, lane);
            }
            cp_async_arrive(shared_address(&barriers.kv_full[stage]));
        }
        filled = (filled + 2 * num_tiles) % (2 * NUM_STAGES);
    }
};
#endif

// The warpgroup that brings the data: it takes pieces of work off the counter, and fills the stages
// of Q, K and V, far ahead of the warpgroups that compute where the stages allow it.
//
// Tiles of K and V come last tile first, so that the tiles that need masks, and the one that is
// not whole, come while the pipeline fills. K runs one tile ahead of V.
#pragma once
#include "pipeline_sm90.cuh"
#include "merge.cuh"

constexpr int NUM_PRODUCER_WARPS = WARPGROUP / WARP_SIZE;
#if CUPAGED_PAGE_ALIGNED
// The first two warps have K and V brought by the copy engine, each every other box: asking for a
// box takes a warp so long that one could hardly keep up where a page is 16 keys. The others copy
// Q, and the third takes the pieces of work besides.
constexpr int KV_WARPS = 2;
constexpr int FIRST_Q_WARP = 2;
constexpr int KV_ARRIVALS = KV_WARPS;
#else
// Every warp copies its share of Q, and of K or V; the first takes the pieces of work besides. A
// thread's copies arrive on their own.
constexpr int FIRST_Q_WARP = 0;
constexpr int KV_WARPS = NUM_PRODUCER_WARPS;
// Some warps copy K and the others V: 7% faster at head_dim 128, 2 and 3% slower at 64 and 256.
constexpr bool BY_KIND = HEAD_DIM == 128;
constexpr int ROW_WARPS = BY_KIND ? KV_WARPS / 2 : KV_WARPS;  // that share a tile
constexpr int KV_ARRIVALS = ROW_WARPS * WARP_SIZE;
#endif
constexpr int Q_WARPS = NUM_PRODUCER_WARPS - FIRST_Q_WARP;

__device__ __forceinline__ int num_kv_tiles(const Item& item) {
    return (item.kv_end - item.kv_begin + CTA_TILE_KV - 1) / CTA_TILE_KV;
}

// The pieces of work of a block, as one of its warps takes them and writes them down for all. A
// piece is looked up well before its place among the pieces of work is free.
struct Claims {
    const Params& p;
    int piece;      // the one that is looked up
    int word;       // of it, this lane's part; -1 where there is none
    int following;  // on lane 0, the piece after it, a number that comes only much later
    PlaceWork at;

    // Only one warp `takes` them.
    __device__ __forceinline__ Claims(const Params& p, bool takes, int lane)
        : p(p), piece(blockIdx.x) {
        if (takes) look_up(lane);
    }

    __device__ __forceinline__ bool more() const { return piece < num_pieces(p); }

    // Whether no block has a second piece: then nobody asks for one.
    __device__ __forceinline__ bool all_first() const {
        return num_pieces(p) <= static_cast<int>(gridDim.x);
    }

    __device__ __forceinline__ void look_up(int lane) {
        word = -1;
        following = 0;
        if (!more()) return;
        if (lane == 0) following = gridDim.x + (all_first() ? 0 : atomicAdd(p.work_counters, 1));
        // Lanes 0..11 read the item, 12 has the head.
        if (lane < 12) word = reinterpret_cast<const int*>(p.items + piece / p.num_kv_heads)[lane];
        if (lane == 12) word = piece % p.num_kv_heads;
    }

    // Writes the piece down and looks the next one up. False where there was none, which is written
    // down too.
    __device__ __forceinline__ bool next(Control& control, int lane) {
        wait_empty(control.barriers.work_empty, at.stage, at.round);
        if (lane < 13) reinterpret_cast<int*>(&control.work[at.stage])[lane] = word;
        mbarrier_arrive(shared_address(&control.barriers.work_full[at.stage]));
        at.advance();
        if (!more()) return false;
        piece = __shfl_sync(~0u, following, 0);
        look_up(lane);
        return true;
    }

    // The last block to leave sets the counters back for the next launch: no other block will ask
    // for work, since each has counted itself out after its last request.
    __device__ __forceinline__ void finish(int lane) {
        if (lane > 0 || all_first()) return;
        __threadfence();
        if (atomicAdd(p.work_counters + 1, 1) == gridDim.x - 1)
            p.work_counters[0] = p.work_counters[1] = 0;
    }
};
static_assert(sizeof(Item) == 48, "look_up() reads it by words");

// Copying rows: WARPS warps take ROWS_PER_PASS neighbouring rows each in every pass, 16 bytes a
// lane. Each lane finds the place of one of its warp's rows, this one of those to copy.
template <int WARPS>
__device__ __forceinline__ int row_to_find(int warp, int lane) {
    return (lane % ROW_CHUNKS * WARPS + warp) * ROWS_PER_PASS + lane / ROW_CHUNKS;
}

// Starts the copies to a tile, or a part of one that begins at a group. `found` is the place of the
// lane's row_to_find(), in elements from `source`; the lanes that copy a row have it from one of
// them.
template <int WARPS, int PASSES>
__device__ __forceinline__ void copy_rows(u32 tile, const u16* source, i64 found, int warp,
                                          int lane) {
    static_assert(PASSES <= ROW_CHUNKS, "a lane finds one row");
    const int chunk = lane % ROW_CHUNKS;
    const i64 bytes = found * 2;
    const char* const begin = reinterpret_cast<const char*>(source + chunk * 8);
    const u32 origin = tile + grouped_offset(warp * ROWS_PER_PASS + lane / ROW_CHUNKS, chunk);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        // The pass's first row and the lane's share in it are different bits of a row.
        const int rows = pass * WARPS * ROWS_PER_PASS;
        const u32 place = (origin ^ ((rows % 8) << 4)) + rows / 8 * GROUP_BYTES + rows % 8 * 128;
        cp_async_16(place, begin + __shfl_sync(~0u, bytes, pass, ROW_CHUNKS), 16);
    }
}

// Starts the copies of the rows of q that the tile packs, as one of Q_WARPS warps; instead of rows
// past the end, whose results nobody wants, the last row again.
__device__ __forceinline__ void copy_q(const Params& p, const Work& work, u32 tile, int warp,
                                       int lane) {
    constexpr int ROWS = Q_WARPS * WARP_SIZE;  // that all the lanes find
    static_assert(CTA_TILE_Q % (ROWS / 2) == 0, "the last round is a whole one or a half");
    const RowMap rows(p, work);
    const int last = rows.packed_len - 1 - rows.packed_begin;
#pragma unroll 1
    for (int first = 0; first < CTA_TILE_Q; first += ROWS) {
        const int row = min(first + row_to_find<Q_WARPS>(warp, lane), last);
        const i64 found = rows.offset(row, p.q_stride_row, p.q_stride_head);
        const u32 part = tile + first / 8 * GROUP_BYTES;
        if (first + ROWS <= CTA_TILE_Q)
            copy_rows<Q_WARPS, ROW_CHUNKS>(part, p.q, found, warp, lane);
        else
            copy_rows<Q_WARPS, ROW_CHUNKS / 2>(part, p.q, found, warp, lane);
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
    int my_bytes;  // of the warp's boxes of a tile
    int warp;
    u32 tail_round;
    PlaceKv at;

    __device__ __forceinline__ BoxLoader(const Params& p, Barriers& barriers, u32 tiles,
                                         const TensorMap* k_map, const TensorMap* v_map, int warp,
                                         int lane)
        : p(p), barriers(barriers), tiles(tiles), k_map(k_map), v_map(v_map),
          box_rows(min(p.page_size & -p.page_size, CTA_TILE_KV & -CTA_TILE_KV)),
          row((warp + lane * KV_WARPS) * box_rows), warp(warp), tail_round(0) {
        const int boxes = CTA_TILE_KV / box_rows;
        my_bytes = (boxes + KV_WARPS - 1 - warp) / KV_WARPS * box_rows * ROW_BYTES;
    }

    // Has the warp's boxes of a tile brought, which its lanes have looked up.
    __device__ __forceinline__ void copy(const TensorMap* map, u32 tile, int panel, int group,
                                         int page, int lane, u32 barrier) {
        if (lane == 0) mbarrier_arrive_expect(barrier, my_bytes);
        __syncwarp();  // the bytes are announced before any come
        if (row < CTA_TILE_KV)
            copy_box_5d(tile + row * ROW_BYTES, map, 0, 0, panel, group, page, barrier);
    }

    // Clears the rows of a V tile from `first` to `end`: a weight of 0 times what lies there is not
    // 0 where that is NaN.
    __device__ __forceinline__ void clear(u32 tile, int first, int end, int lane) {
        for (int i = lane; i < (end - first) * ROW_CHUNKS; i += WARP_SIZE)
            store_zeros(tile + grouped_offset(first + i / ROW_CHUNKS, i % ROW_CHUNKS));
    }

    __device__ __forceinline__ void load(const Work& work, int lane) {
        const Item item = work.item;
        const int page_begin = work.item.page_begin;
        const int k_panel = work.kv_head * static_cast<int>(p.k_stride_head / 64);
        const int v_panel = work.kv_head * static_cast<int>(p.v_stride_head / 64);
        const int num_tiles = num_kv_tiles(item);
        int begin = item.kv_begin + (num_tiles - 1) * CTA_TILE_KV;
        // Where this lane's box of the tile at `begin` lies.
        int page, group;
        const auto look_up = [&] {
            const int key = begin + row;
            page = 0;
            group = p.page_size / 8;  // outside of the tensor: zeros
            if (row < CTA_TILE_KV && key >= item.kv_begin && key < item.kv_end) {
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
                copy(k_map, tiles + at.stage * TILE_KV_BYTES, k_panel, group, page, lane,
                     shared_address(&barriers.kv_full[at.stage]));
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
                const int keys = item.kv_end - (item.kv_begin + (num_tiles - tile) * CTA_TILE_KV);
                // The box that the keys end in, if they do in the midst of one, is one warp's.
                if (keys < CTA_TILE_KV && keys % box_rows != 0 &&
                    keys / box_rows % KV_WARPS == warp) {
                    const u32 tail = shared_address(&barriers.v_tail[warp]);
                    copy(v_map, target, v_panel, v_group, v_page, lane, tail);
                    mbarrier_wait(tail, tail_round);
                    tail_round ^= 1;
                    clear(target, keys, keys + box_rows - keys % box_rows, lane);
                    fence_async_proxy();
                    arrive_warp(full, lane);
                } else {
                    copy(v_map, target, v_panel, v_group, v_page, lane, shared_address(full));
                }
                at.advance();
            }
        }
    }
};

__device__ __forceinline__ void produce(const Params& p, const TensorMap* k_map,
                                        const TensorMap* v_map, Claims& claims, Control& control,
                                        u32 q_tiles, u32 kv_tiles, int warp, int lane) {
    Barriers& barriers = control.barriers;
    PlaceWork at;
    if (warp < KV_WARPS) {
        BoxLoader loader(p, barriers, kv_tiles, k_map, v_map, warp, lane);
        for (;; at.advance()) {
            wait_full(barriers.work_full, at.stage, at.round);
            const Work& work = control.work[at.stage];
            if (work.kv_head < 0) break;
            loader.load(work, lane);
            mbarrier_arrive(shared_address(&barriers.work_empty[at.stage]));
        }
    } else {
        bool more = warp == FIRST_Q_WARP && claims.next(control, lane);
        for (PlaceQ q_at;; at.advance(), q_at.advance()) {
            wait_full(barriers.work_full, at.stage, at.round);
            const Work& work = control.work[at.stage];
            if (work.kv_head < 0) break;
            wait_empty(barriers.q_empty, q_at.stage, q_at.round);
            copy_q(p, work, q_tiles + q_at.stage * TILE_Q_BYTES, warp - FIRST_Q_WARP, lane);
            cp_async_arrive(shared_address(&barriers.q_full[q_at.stage]));
            if (more) more = claims.next(control, lane);
        }
        if (warp == FIRST_Q_WARP) claims.finish(lane);
    }
}
#else
// K and V row by row. Either every warp copies its share of every tile, and the page table is read
// one tile ahead of the copies; or two warps copy the tiles of K and two those of V, half of a tile's
// rows each, and read the page table as they go.
template <bool BY_KIND, int WARPS>
struct RowLoader;

template <int WARPS>
struct RowLoader<false, WARPS> {
    static constexpr int PASSES = CTA_TILE_KV / (WARPS * ROWS_PER_PASS);
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
    __device__ __forceinline__ void copy(const u16* head, i64 offset) {
        wait_empty(barriers.kv_empty, at.stage, at.round);
        copy_rows<WARPS, PASSES>(tiles + at.stage * TILE_KV_BYTES, head, offset, warp, lane);
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
        const auto look_up = [&](int tile) {
            // Instead of keys past the end, which are masked and weigh nothing, the last one again.
            const int row = tile * CTA_TILE_KV + row_to_find<WARPS>(warp, lane);
            const int key = min(item.kv_begin + row, item.kv_end - 1);
            const int index = divide(key, p.page_magic, p.page_shift);
            return Key{pages[index], key - index * p.page_size};
        };
        Key last, now = look_up(num_tiles - 1);
#pragma unroll 1
        for (int tile = num_tiles - 1; tile >= 0; --tile) {
            const Key next = look_up(max(tile - 1, 0));
            copy(k, now.page * p.k_stride_page + now.in_page * p.k_stride_token);
            if (tile < num_tiles - 1)
                copy(v, last.page * p.v_stride_page + last.in_page * p.v_stride_token);
            last = now;
            now = next;
        }
        copy(v, last.page * p.v_stride_page + last.in_page * p.v_stride_token);
    }
};

template <int WARPS>
struct RowLoader<true, WARPS> {
    static constexpr int PASSES = CTA_TILE_KV / (WARPS * ROWS_PER_PASS);
    static constexpr int LOOKUPS = (PASSES + ROW_CHUNKS - 1) / ROW_CHUNKS;  // rows that a lane finds
    static constexpr int LAST_PASSES = PASSES - (LOOKUPS - 1) * ROW_CHUNKS;
    static constexpr int ROWS_A_LOOKUP = ROW_CHUNKS * WARPS * ROWS_PER_PASS;
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
#pragma unroll 1
        for (int i = 0; i < num_tiles; ++i) {
            const int begin = item.kv_begin + (num_tiles - 1 - i) * CTA_TILE_KV;
            i64 found[LOOKUPS];
#pragma unroll
            for (int j = 0; j < LOOKUPS; ++j) {
                const int row = j * ROWS_A_LOOKUP + row_to_find<WARPS>(half, lane);
                // Instead of keys past the end, which are masked and weigh nothing, the last again.
                found[j] = offset(item, min(begin + row, item.kv_end - 1));
            }
            const int at = place(i, num_tiles);
            const int stage = at % NUM_STAGES;
            wait_empty(barriers.kv_empty, stage, at / NUM_STAGES % 2);
            const u32 tile = tiles + stage * TILE_KV_BYTES;
#pragma unroll
            for (int j = 0; j < LOOKUPS; ++j) {
                const u32 part = tile + j * (ROWS_A_LOOKUP / 8 * GROUP_BYTES);
                if (j < LOOKUPS - 1)
                    copy_rows<WARPS, ROW_CHUNKS>(part, head, found[j], half, lane);
                else
                    copy_rows<WARPS, LAST_PASSES>(part, head, found[j], half, lane);
            }
            cp_async_arrive(shared_address(&barriers.kv_full[stage]));
        }
        filled = (filled + 2 * num_tiles) % (2 * NUM_STAGES);
    }
};

__device__ __forceinline__ void produce(const Params& p, const TensorMap*, const TensorMap*,
                                        Claims& claims, Control& control, u32 q_tiles, u32 kv_tiles,
                                        int warp, int lane) {
    Barriers& barriers = control.barriers;
    RowLoader<BY_KIND, ROW_WARPS> loader(p, barriers, kv_tiles, warp, lane);
    PlaceWork at;
    bool more = warp == FIRST_Q_WARP && claims.next(control, lane);
    for (PlaceQ q_at;; at.advance(), q_at.advance()) {
        // One ahead of the copies, which would else wait for its answer.
        if (more) more = claims.next(control, lane);
        wait_full(barriers.work_full, at.stage, at.round);
        const Work& work = control.work[at.stage];
        if (work.kv_head < 0) break;
        wait_empty(barriers.q_empty, q_at.stage, q_at.round);
        // Not the warp and lane that are kept: a register less during the copies, which have no
        // more.
        copy_q(p, work, q_tiles + q_at.stage * TILE_Q_BYTES, thread_index() / WARP_SIZE,
               lane_index());
        cp_async_arrive(shared_address(&barriers.q_full[q_at.stage]));
        loader.load(work);
        mbarrier_arrive(shared_address(&barriers.work_empty[at.stage]));
    }
    if (warp == FIRST_Q_WARP) claims.finish(lane);
}
#endif

// Brings tiles of K and V from their pages into shared memory.
//
// A warp copies ROWS_PER_WARP consecutive keys of each tile, all tiles. Where the page size is a
// multiple of that (CUPAGED_PAGE_ALIGNED), those keys lie in one page, and one look into the page
// table gives the address of them all; otherwise each lane looks up one key, and the lanes exchange
// what they found. Either way the page table is read one tile ahead of the copies that need it.
#pragma once
#include "params.cuh"
#include "tile.cuh"

constexpr int ROWS_PER_WARP = CTA_TILE_KV / NUM_WARPS;
constexpr int PASSES_PER_TILE = ROWS_PER_WARP / ROWS_PER_PASS;
static_assert(CTA_TILE_KV % NUM_WARPS == 0 && ROWS_PER_WARP <= WARP_SIZE, "a lane looks up a key");
static_assert(ROWS_PER_WARP % ROWS_PER_PASS == 0, "a pass must not leave its warp's keys");

struct KvLoader {
    // Strides and divisors are read from the parameters where they are used, since constant memory
    // costs nothing and registers are short.
    const Params& p;
    int kv_head;
    int page_begin;  // where the request's pages begin in page_indices
    int kv_end;      // keys from here on are filled with zeros
    int warp_row;    // the warp's first row of every tile
    u32 target;      // where the lane copies to in the first stage's K tile
    int page;        // of the next tile: page of the key this lane looks up
    int in_page;     // and the key's place in it

    __device__ __forceinline__ KvLoader(const Params& p, const Work& work, u32 stages, int warp,
                                        int lane)
        : p(p),
          kv_head(work.kv_head),
          page_begin(work.item.page_begin),
          kv_end(work.item.kv_end),
          warp_row(warp * ROWS_PER_WARP),
          target(stages + copy_offset(warp * ROWS_PER_WARP, lane)) {
        look_up(work.item.kv_begin, lane);
    }

    // Finds the page of the key that this lane looks up for the tile that begins at key `begin`.
    // Keys beyond the end have no page; page 0 exists, and nothing is read from it for them.
    __device__ __forceinline__ void look_up(int begin, int lane) {
        const int key = begin + warp_row + (CUPAGED_PAGE_ALIGNED ? 0 : lane % ROWS_PER_WARP);
        page = in_page = 0;
        if (key < kv_end) {
            const int index = divide(key, p.page_magic, p.page_shift);
            page = p.page_indices[page_begin + index];
            in_page = key - index * p.page_size;
        }
    }

    // Starts the copies of the tile that begins at key `begin` to the stage that lies `stage` bytes
    // after the first, K before V, and looks up the pages of the tile after it.
    __device__ __forceinline__ void load(int begin, u32 stage, int lane) {
        const int lane_row = lane / ROW_CHUNKS;
        // Of the KV head and the lane's chunk: [num_pages, page_size] rows.
        const u16* k = p.k + kv_head * p.k_stride_head + lane % ROW_CHUNKS * 8;
        const u16* v = p.v + kv_head * p.v_stride_head + lane % ROW_CHUNKS * 8;
        // Of the key that this lane has looked up.
        const i64 k_offset = page * p.k_stride_page + in_page * p.k_stride_token;
        const i64 v_offset = page * p.v_stride_page + in_page * p.v_stride_token;
        const u16* k_row = k + k_offset + lane_row * p.k_stride_token;
        const u16* v_row = v + v_offset + lane_row * p.v_stride_token;
#pragma unroll
        for (int pass = 0; pass < PASSES_PER_TILE; ++pass) {
            const int row = pass * ROWS_PER_PASS + lane_row;
            const int bytes = begin + warp_row + row < kv_end ? 16 : 0;
            if (!CUPAGED_PAGE_ALIGNED) {
                k_row = k + __shfl_sync(~0u, k_offset, row);
                v_row = v + __shfl_sync(~0u, v_offset, row);
            }
            const u32 row_target = copy_pass(target + stage, pass);
            cp_async_16(row_target, k_row, bytes);
            cp_async_16(row_target + CTA_TILE_KV * ROW_BYTES, v_row, bytes);
            if (CUPAGED_PAGE_ALIGNED) {
                k_row += ROWS_PER_PASS * p.k_stride_token;
                v_row += ROWS_PER_PASS * p.v_stride_token;
            }
        }
        look_up(begin + CTA_TILE_KV, lane);
    }
};

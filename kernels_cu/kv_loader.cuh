// Brings tiles of K and V from their pages into shared memory.
//
// A warp copies ROWS_PER_WARP consecutive keys of each tile, all tiles. Where the page size is a
// multiple of that (CUPAGED_PAGE_ALIGNED), those keys lie in one page, and one look into the page
// table gives the address of them all; otherwise each lane looks up one key, and the lanes exchange
// what they found. Either way the page table is read one tile ahead of the copies that need it.
//
// Keys that a window hides from all rows of the query tile, or a mask from all of the request, become
// zeros, as those past the end do: a weight of 0 times what lies there is not 0 where that is NaN.
#pragma once
#include "policy.cuh"
#include "tile.cuh"

constexpr int ROWS_PER_WARP = CTA_TILE_KV / NUM_WARPS;
constexpr int TILE_K_BYTES = CTA_TILE_KV * K_ROW_BYTES;
static_assert(CTA_TILE_KV % NUM_WARPS == 0 && ROWS_PER_WARP <= WARP_SIZE, "a lane looks up a key");
static_assert(ROWS_PER_WARP % KRows::PER_PASS == 0 && ROWS_PER_WARP % VRows::PER_PASS == 0,
              "a pass must not leave its warp's keys");

// A warp's copies of its keys' rows of a tile of K or V.
template <typename R, int VALID_CHUNKS>
struct RowCopies {
    static constexpr int PASSES = ROWS_PER_WARP / R::PER_PASS;
    u32 target;              // the lane's place in the tile
    const KvElement* chunk;  // the lane's chunk of the KV head's row: [num_pages, page_size]
    const KvElement* row;    // and of the row that comes next
    i64 found;               // offset of the key that this lane has looked up
    i64 stride_token;

    __device__ __forceinline__ RowCopies(u32 target, const KvElement* head, i64 found,
                                         i64 stride_token, int lane)
        : target(target),
          chunk(head + lane % R::CHUNKS * (16 / static_cast<int>(sizeof(KvElement)))),
          row(chunk + found + lane / R::CHUNKS * stride_token),
          found(found),
          stride_token(stride_token) {}

    // Whether a row of the warp's in the tile is among what KvLoader::keys() returned.
    static __device__ __forceinline__ bool has(int keys, int which) {
        return CUPAGED_HIDES ? keys >> which & 1 : which < keys;
    }

    // Of the warp's rows in the tile those of `keys` hold keys; the others become zeros.
    __device__ __forceinline__ void copy(int pass, int keys, int lane) {
        const int which = pass * R::PER_PASS + lane / R::CHUNKS;
        if (!CUPAGED_PAGE_ALIGNED) row = chunk + __shfl_sync(~0u, found, which);
        if (VALID_CHUNKS == R::CHUNKS || lane % R::CHUNKS < VALID_CHUNKS)
            cp_async_16(R::copy_pass(target, pass), row, has(keys, which) ? 16 : 0);
        if (CUPAGED_PAGE_ALIGNED) row += R::PER_PASS * stride_token;
    }
};

struct KvLoader {
    // Strides and divisors are read from the parameters where they are used, since constant memory
    // costs nothing and registers are short.
    const Params& p;
    int kv_head;
    int page_begin;  // where the request's pages begin in page_indices
    int kv_end;      // keys from here on are filled with zeros
    int first_seen;  // and, without a mask, those before this one
    int warp_row;    // the warp's first row of every tile
    u32 k_target;    // where the lane copies to in the first stage's K tile
    u32 v_target;    // and in its V tile
    int page;        // of the next tile: page of the key this lane looks up
    int in_page;     // and the key's place in it
    int seen_begin;  // with a mask: where the request's words begin in seen_keys
    u32 seen;        // of the next tile: the word with the bit of the lane's row, if it has a key

    // first_seen: the first key that a window shows a row of the query tile.
    __device__ __forceinline__ KvLoader(const Params& p, const Work& work, int first_seen,
                                        u32 stages, int warp, int lane)
        : p(p),
          kv_head(work.kv_head),
          page_begin(work.item.page_begin),
          kv_end(work.item.kv_end),
          first_seen(first_seen),
          warp_row(warp * ROWS_PER_WARP),
          k_target(stages + KRows::copy_offset(warp * ROWS_PER_WARP, lane)),
          v_target(stages + TILE_K_BYTES + VRows::copy_offset(warp * ROWS_PER_WARP, lane)) {
        if (CUPAGED_CUSTOM_MASK) seen_begin = p.seen_keys[work.item.request];
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
        if (CUPAGED_CUSTOM_MASK) {
            const int own = key_of_row(begin, lane);
            seen = own < kv_end ? p.seen_keys[seen_begin + own / 32] : 0;
        }
    }

    // The key of the warp's row that a lane has, in the tile that begins at key `begin`.
    __device__ __forceinline__ int key_of_row(int begin, int lane) const {
        return begin + warp_row + lane % ROWS_PER_WARP;
    }

    // Of the warp's rows of the tile that begins at key `begin` the first so many hold keys; or,
    // where some may be hidden, those hold keys whose bit is set.
    __device__ __forceinline__ int keys(int begin, int lane) const {
        if (!CUPAGED_HIDES) return kv_end - begin - warp_row;
        const int own = key_of_row(begin, lane);
        const bool is_key =
            CUPAGED_CUSTOM_MASK ? seen >> own % 32 & 1 : own >= first_seen && own < kv_end;
        return __ballot_sync(~0u, is_key);
    }

    // Starts the copies of the tile that begins at key `begin` to the stage that lies `stage` bytes
    // after the first, K before V, and looks up the pages of the tile after it.
    __device__ __forceinline__ void load(int begin, u32 stage, int lane) {
        RowCopies<KRows, K_CHUNKS> k(k_target + stage, p.k + kv_head * p.k_stride_head,
                                     page * p.k_stride_page + in_page * p.k_stride_token,
                                     p.k_stride_token, lane);
        RowCopies<VRows, V_CHUNKS> v(v_target + stage, p.v + kv_head * p.v_stride_head,
                                     page * p.v_stride_page + in_page * p.v_stride_token,
                                     p.v_stride_token, lane);
        const int rows = keys(begin, lane);
#pragma unroll
        for (int pass = 0; pass < k.PASSES || pass < v.PASSES; ++pass) {
            if (pass < k.PASSES) k.copy(pass, rows, lane);
            if (pass < v.PASSES) v.copy(pass, rows, lane);
        }
        look_up(begin + CTA_TILE_KV, lane);
    }
};

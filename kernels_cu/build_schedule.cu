// The planner's items of a ragged batch, made on the device, for sm_80 and later: by one block.
// Others, one a request, may look for pages that it has twice meanwhile.
//
// What `schedule.build()` in cupaged/schedule.py makes of whole query tiles, item for item: that is
// the definition, and says why. Constants in capitals that are not explained here are those of
// cupaged/heuristics.py.
#include "block_sort.cuh"
#include "item.cuh"
#include "repeats.cuh"

struct BuildSchedule {
    const int* qo_indptr;  // [batch + 1]
    const int* kv_len;     // [batch]
    const int* kv_indptr;  // [batch + 1]: first entry of the page table
    Item* items;           // [room for tiles and partial states]
    int* work_counters;    // [3], as in Params
    int* merge_counters;   // [num_merge_counters]
    int num_merge_counters, most_partials;
    int batch, gqa_group_size, num_kv_heads, causal;
    int cta_tile_q, cta_tile_kv, slots;
    int fill_last_wave;  // whether a slot without work is lost
    int light_len;       // requests of no more queries are light; 0: none is
    int to_align;
    Repeats repeats;     // for blocks behind the first
};

// A key that sorts: the longest first, equal ones as they come.
constexpr u32 MOST_KV_TILES = (1u << (32 - INDEX_BITS)) - 1;
constexpr u32 INDEX_MASK = (1u << INDEX_BITS) - 1;
constexpr int NUM_CANDIDATES = 4;
constexpr int MOST_PIECES = 2 * NUM_THREADS;  // of at most NUM_THREADS split tiles

__device__ __forceinline__ u32 sort_key(int kv_tiles, int index) {
    return (MOST_KV_TILES - kv_tiles) << INDEX_BITS | index;
}
__device__ __forceinline__ int index_of(u32 key) { return key & INDEX_MASK; }
__device__ __forceinline__ int kv_tiles_of(u32 key) { return MOST_KV_TILES - (key >> INDEX_BITS); }

// Rounded up, of a dividend of either sign.
template <typename T>
__device__ __forceinline__ T ceil_div(T dividend, T divisor) {
    return dividend > 0 ? (dividend - 1) / divisor + 1 : dividend / divisor;
}

// What all threads know of the tiles, and of the split that the first one chooses.
struct Facts {
    u64 tiles, light, nearly_equal_tiles;  // KV tiles: of all, of light ones, of nearly the longest
    int nearly_equal;                      // tiles nearly as long as the longest
    int num_chunks, chunks[NUM_CANDIDATES];
    int wholes[NUM_CANDIDATES], exact[NUM_CANDIDATES];  // pieces as long as a chunk; tiles without
                                                        // a shorter one
    int chunk, first;                                   // 0: no tile is split
    int num_partials;
};

// The keys of a tile, and where it lies.
struct Tile {
    int request, row_begin, kv_end, kv_tiles;

    // `ends`: [batch], the tiles of each request and of all before it.
    __device__ __forceinline__ Tile(const BuildSchedule& b, const int* ends, int tile) {
        request = count_below(ends, b.batch, tile + 1);
        row_begin = (tile - (request ? ends[request - 1] : 0)) * b.cta_tile_q;
        kv_end = b.kv_len[request];
        if (b.causal) {
            const int qo_len = b.qo_indptr[request + 1] - b.qo_indptr[request];
            const int last_query = (row_begin + b.cta_tile_q - 1) / b.gqa_group_size;
            kv_end = max(0, min(kv_end, kv_end - qo_len + last_query + 1));
        }
        kv_tiles = ceil_div(kv_end, b.cta_tile_kv);
    }
};

__device__ __forceinline__ void write_item(const BuildSchedule& b, const int* ends, int place,
                                           int tile_number, int chunk, int split, int num_splits,
                                           int first_partial, int merge) {
    const Tile tile(b, ends, tile_number);
    const int qo_begin = b.qo_indptr[tile.request];
    const int size = chunk * b.cta_tile_kv;
    const bool last = split == num_splits - 1;
    b.items[place] = {tile.request, tile.row_begin, split * size,
                      last ? tile.kv_end : (split + 1) * size, split, num_splits, first_partial,
                      merge, qo_begin, b.qo_indptr[tile.request + 1] - qo_begin,
                      b.kv_len[tile.request], b.kv_indptr[tile.request]};
}

// When tiles in pieces of `chunk`, `wholes` of them, and shorter ones end: `_split_finish()`.
__device__ double split_finish(const BuildSchedule& b, i64 tiles, i64 chunk, i64 wholes,
                               i64 rests) {
    const i64 overhead = ITEM_COST + SPLIT_COST;
    const double mean =
        static_cast<double>((tiles + (wholes + rests) * overhead) * b.num_kv_heads) / b.slots;
    const i64 waves = ceil_div<i64>(wholes * b.num_kv_heads, b.slots);
    double finish = static_cast<double>(waves * (chunk + overhead));
    if (rests * b.num_kv_heads > waves * b.slots - wholes * b.num_kv_heads)
        finish += static_cast<double>(tiles - wholes * chunk) / rests + overhead;
    return max(mean, finish);
}

// When unsplit tiles end at the earliest, as waves: `_waves_end()`.
__device__ i64 waves_end(const BuildSchedule& b, const u32* keys, int n) {
    const i64 longest = kv_tiles_of(keys[0]) + ITEM_COST;
    i64 end = 0;
    const i64 waves = ceil_div<i64>(static_cast<i64>(n) * b.num_kv_heads, b.slots);
    for (i64 wave = min(waves, static_cast<i64>(MAX_WAVES)); wave > 0; --wave) {
        if (longest * wave <= end) break;
        const i64 first = (wave - 1) * b.slots / b.num_kv_heads;
        end = max(end, (kv_tiles_of(keys[first]) + ITEM_COST) * wave);
    }
    return end;
}

// `choose_split()` up to its candidates; false where nothing is split whatever they are.
__device__ bool consider(const BuildSchedule& b, const u32* keys, int n, Facts& facts) {
    const i64 longest = kv_tiles_of(keys[0]), slots = b.slots, heads = b.num_kv_heads;
    const i64 tiles = facts.tiles, num_items = n * heads;
    const i64 mean = tiles * heads + ITEM_COST * num_items;
    if (longest < 2 * MIN_TILES_PER_SPLIT) return false;
    if (100 * slots * (longest + ITEM_COST) < WORTH * mean) return false;
    const i64 least = mean + SPLIT_COST * num_items;
    if (100 * slots * waves_end(b, keys, n) <= max(TOO_LATE * mean, 100 * least)) return true;
    const int candidates[NUM_CANDIDATES] = {CANDIDATE_0, CANDIDATE_1, CANDIDATE_2, CANDIDATE_3};
    for (const i64 percent : candidates) {
        const i64 share = ceil_div(percent * tiles * heads, 100 * slots);
        const i64 chunk = min(max(share, static_cast<i64>(MIN_TILES_PER_SPLIT)), longest - 1);
        if (b.fill_last_wave && 100 * chunk >= NEARLY_EQUAL * longest) break;
        facts.chunks[facts.num_chunks++] = static_cast<int>(chunk);
    }
    return true;
}

// The rest of it: `_split_all()`, and `_split_last_wave()`.
__device__ void choose_split(const BuildSchedule& b, const u32* keys, int n, Facts& facts) {
    const i64 longest = kv_tiles_of(keys[0]), slots = b.slots, heads = b.num_kv_heads;
    const i64 num_items = n * heads, cost = ITEM_COST + SPLIT_COST;
    const i64 mean = static_cast<i64>(facts.tiles) * heads + ITEM_COST * num_items;
    const i64 unsplit = waves_end(b, keys, n);
    double finish = static_cast<double>(unsplit);
    for (int i = 0; i < facts.num_chunks; ++i) {
        const int chunk = facts.chunks[i];
        if (chunk + cost >= finish) break;
        const double end =
            split_finish(b, facts.tiles, chunk, facts.wholes[i], n - facts.exact[i]);
        if (end < finish) facts.chunk = chunk, finish = end;
    }
    const i64 saved = facts.light - facts.light / LIGHT;
    const i64 late = slots * unsplit - mean + saved * heads;
    if (!b.fill_last_wave || num_items <= slots || 100 * late < WORTH * mean) return;

    const i64 long_items = facts.nearly_equal;
    const i64 first = (long_items * heads - 1) / slots * slots / heads;
    const i64 pieces = (long_items - first) * heads, free = slots - pieces;
    if (free <= 0) return;
    const i64 whole = kv_tiles_of(keys[first]), rests = ceil_div(pieces, free);
    i64 piece = ceil_div(rests * (whole + cost) - cost, rests + 1);
    const i64 others = n - long_items;
    if (others) {
        const i64 shorter = static_cast<i64>(facts.tiles - facts.nearly_equal_tiles) - saved;
        const i64 work = (shorter + ITEM_COST * others) * heads;
        const i64 level = ceil_div(pieces * (whole + 2 * cost) + work, slots) - cost;
        piece = max(max(piece, level), static_cast<i64>(kv_tiles_of(keys[long_items])));
    }
    if (piece >= whole || 100 * slots * (whole + ITEM_COST - (piece + cost)) < WORTH * mean) return;
    const double end = static_cast<double>(first * heads / slots * (longest + ITEM_COST) + piece +
                                           cost);
    if (facts.chunk == 0 || (end < finish && first)) {
        facts.chunk = static_cast<int>(piece);
        facts.first = static_cast<int>(first);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    cupaged_build_schedule(const __grid_constant__ BuildSchedule b) {
    extern __shared__ u32 memory[];
    __shared__ Facts facts;
    __shared__ int warp_sums[NUM_THREADS / WARP_SIZE];
    __shared__ u32 pieces[MOST_PIECES];         // keys of pieces
    __shared__ u16 split_tile_of[MOST_PIECES];  // each piece's number among the split tiles
    __shared__ int first_partial[NUM_THREADS];  // of each split tile
    int* const ends = reinterpret_cast<int*>(memory);  // [batch]
    u32* const keys = memory + b.batch;                // [tiles, up to a power of two]
    const int thread = threadIdx.x;

    if (blockIdx.x > 0) {
        find_repeats(b.repeats, blockIdx.x - 1, memory);
        return;
    }
    if (thread == 0) facts = Facts{};
    int n = 0;
    for (int begin = 0; begin < b.batch; begin += NUM_THREADS) {
        const int r = begin + thread;
        int count = 0;
        if (r < b.batch)
            count = ceil_div((b.qo_indptr[r + 1] - b.qo_indptr[r]) * b.gqa_group_size, b.cta_tile_q);
        const int end = n + inclusive_sum(count, warp_sums);
        if (r < b.batch) ends[r] = end;
        n += warp_sums[NUM_THREADS / WARP_SIZE - 1];
        __syncthreads();  // all have read the sums
    }

    const int length = power_of_two(n);
    u64 tiles = 0, light = 0;
    for (int i = thread; i < length; i += NUM_THREADS) {
        if (i >= n) {
            keys[i] = ~0u;  // behind all others
            continue;
        }
        const Tile tile(b, ends, i);
        keys[i] = sort_key(tile.kv_tiles, i);
        tiles += tile.kv_tiles;
        if (b.qo_indptr[tile.request + 1] - b.qo_indptr[tile.request] <= b.light_len)
            light += tile.kv_tiles;
    }
    add_up(&facts.tiles, tiles);
    add_up(&facts.light, light);
    sort_in_block(keys, length);  // ends with a barrier: the sums are there too

    if (thread == 0) {
        const int longest = Tile(b, ends, index_of(keys[0])).request;
        // None is light beside others where one of them is the longest.
        if (b.qo_indptr[longest + 1] - b.qo_indptr[longest] <= b.light_len) facts.light = 0;
        // Marked as not to be split at all.
        if (!consider(b, keys, n, facts)) facts.num_chunks = -1;
    }
    __syncthreads();  // the candidates are there
    const int num_chunks = facts.num_chunks;
    if (num_chunks >= 0) {
        const int nearly = ceil_div(NEARLY_EQUAL * kv_tiles_of(keys[0]), 100);
        int nearly_equal = 0, wholes[NUM_CANDIDATES] = {}, exact[NUM_CANDIDATES] = {};
        u64 nearly_equal_tiles = 0;
        for (int i = thread; i < n; i += NUM_THREADS) {
            const int kv_tiles = kv_tiles_of(keys[i]);
            if (kv_tiles >= nearly) ++nearly_equal, nearly_equal_tiles += kv_tiles;
#pragma unroll
            for (int c = 0; c < NUM_CANDIDATES; ++c) {
                const int candidate = c < num_chunks ? facts.chunks[c] : kv_tiles + 1;
                const int whole = kv_tiles / candidate;
                wholes[c] += whole;
                if (whole && whole * candidate == kv_tiles) ++exact[c];
            }
        }
        add_up(&facts.nearly_equal, nearly_equal);
        add_up(&facts.nearly_equal_tiles, nearly_equal_tiles);
#pragma unroll
        for (int c = 0; c < NUM_CANDIDATES; ++c) {
            add_up(&facts.wholes[c], wholes[c]);
            add_up(&facts.exact[c], exact[c]);
        }
        __syncthreads();  // the candidates' pieces are counted
        if (thread == 0) choose_split(b, keys, n, facts);
        __syncthreads();  // the split is there
    }

    // Tiles [first, end) are cut into pieces. Whoever is before stays before; the others and the
    // pieces are merged.
    const int chunk = facts.chunk;
    int first = facts.first, end = first;
    if (chunk) end = count_below(keys, n, sort_key(chunk, 0));
    int num_splits = 0;
    for (int i = first + thread; i < end; i += NUM_THREADS)
        num_splits += ceil_div(kv_tiles_of(keys[i]), chunk);
    add_up(&facts.num_partials, num_splits);
    __syncthreads();  // the partial states are counted
    const int num_partials = facts.num_partials;
    if (num_partials > b.most_partials) end = first = 0;
    const int num_merges = end - first;
    const int num_pieces = num_merges > 0 ? num_partials : 0;
    if (num_pieces) {
        const int longest = thread < num_merges ? kv_tiles_of(keys[first + thread]) : 0;
        num_splits = ceil_div(longest, chunk);
        const int begin = inclusive_sum(num_splits, warp_sums) - num_splits;
        if (thread < num_merges) first_partial[thread] = begin;
        for (int s = 0; s < num_splits; ++s) {
            pieces[begin + s] = sort_key(min(chunk, longest - s * chunk), begin + s);
            split_tile_of[begin + s] = thread;
        }
        const int room = power_of_two(num_pieces);
        for (int i = num_pieces + thread; i < room; i += NUM_THREADS) pieces[i] = ~0u;
        __syncthreads();  // the pieces are there
        sort_in_block(pieces, room);
    } else {
        first = end = 0;
    }

    for (int i = thread; i < n; i += NUM_THREADS) {
        if (i >= first && i < end) continue;
        const int before = i < first ? 0 : count_below(pieces, num_pieces, keys[i] | INDEX_MASK);
        const int place = i < first ? i : first + (i - end) + before;
        write_item(b, ends, place, index_of(keys[i]), 0, 0, 1, 0, 0);
    }
    for (int i = thread; i < num_pieces; i += NUM_THREADS) {
        const int piece = index_of(pieces[i]), merge = split_tile_of[piece];
        const u32 key = keys[first + merge];
        const u32 longer = pieces[i] & ~INDEX_MASK;
        const int place = first + i + count_below(keys + end, n - end, longer);
        write_item(b, ends, place, index_of(key), chunk, piece - first_partial[merge],
                   ceil_div(kv_tiles_of(key), chunk), first_partial[merge], merge);
    }
    for (int i = thread; i < b.num_merge_counters; i += NUM_THREADS) b.merge_counters[i] = 0;
    if (thread == 0) {
        b.work_counters[0] = b.work_counters[1] = 0;
        b.work_counters[2] = n - num_merges + num_pieces;
    }
}

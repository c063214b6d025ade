// What a warp of decode's attention reads, tile after tile: a part of the line (see decode.cuh), and the copies to shared memory.
//
// Knows no sums. Part of attention.cu, whose rows of shared memory it fills. Blocks of pages are looked up ahead of time.
#pragma once

#define D_WARPS (WIDE ? 2 : 4)
#define D_THREADS (D_WARPS * 32)
#define D_KEYS 16                                  // of a tile
#define D_SPLIT ((GROUP + 7) / 8)                  // heads of the line that share a KV head
#define D_HEADS ((GROUP + D_SPLIT - 1) / D_SPLIT)  // query heads of each, at most
#define D_TILE_BYTES (D_KEYS * ROW_BYTES)
#define D_STAGES 2
#define D_NOTE_BYTES (D_HEADS * ROW_BYTES + 16)  // q, and what the tile is
#define D_NOTES_AT (D_STAGES * 2 * D_TILE_BYTES)
#define D_SUMS_AT (D_NOTES_AT + D_STAGES * D_NOTE_BYTES)
#define D_WARP_BYTES ((D_SUMS_AT + (STEPS + 1) * 512 + 127) / 128 * 128)  // attention.py: decode_smem
#define D_COST_KEYS 32  // keys of a unit of cost; the end of a chunk costs one: attention.py, COST_KEYS
#ifndef D_BLOCKS
#define D_BLOCKS (HEAD_DIM <= 64 ? 3 : HEAD_DIM <= 128 ? 2 : 1)  // blocks that share a multiprocessor
#endif

// A sequence with one row: attention.py, decode_items.
struct Item {
    i32 sequence, row, context, length;        // length: keys of a chunk
    i32 start, cost, first_chunk, num_chunks;  // of each head; start, first_chunk: what all sequences before it have
};
DEV Item load_item(const Item* p) {
    const int4 a = *(const int4*)p, b = *((const int4*)p + 1);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// What a launch reads.
struct Inputs {
    const u16 *q, *k, *v;
    i64 q_stride;
    const Item* items;
    const i32* table;
    i32 table_width, num_kv, num_items, cost, num_chunks;  // cost, num_chunks: of all, for each head
    DEV i32 heads() const { return num_kv * D_SPLIT; }
};

// One of a warp's D_STAGES tiles in shared memory.
struct Stage {
    u32 warp;  // where the warp's begin
    i32 index;
    DEV u32 keys() const { return warp + index * (2 * D_TILE_BYTES); }
    DEV u32 values() const { return keys() + D_TILE_BYTES; }
    DEV u32 q() const { return warp + D_NOTES_AT + index * D_NOTE_BYTES; }
    DEV u32 note() const { return q() + D_HEADS * ROW_BYTES; }
    DEV void next() { index = index + 1 == D_STAGES ? 0 : index + 1; }
};

// The query heads of a head of the line.
DEV i32 first_query(i32 head) { return head / D_SPLIT * GROUP + head % D_SPLIT * D_HEADS; }
DEV i32 count_queries(i32 head) { return min(D_HEADS, GROUP - head % D_SPLIT * D_HEADS); }

DEV void fetch_q(const Inputs& c, const Stage& stage, i32 row, i32 head) {
    const u16* q = c.q + row * c.q_stride + first_query(head) * HEAD_DIM;
    for (i32 n = threadIdx.x % 32; n < count_queries(head) * VECTORS; n += 32) cp_async16(stage.q() + at(n / VECTORS, n % VECTORS), q + n * 8);
}

// What a warp reads next: a tile in place of each that it has added up.
struct Feed {
    Item item, ahead;
    i32 piece, index, head, chunk, key, end;  // end: of the piece
    i32 position, stop;                       // on the line; the part ends there
    i32 pages, first_page, pages_after, first_after;
    bool opens;

    // Begin a part of the line. Where chunks are no more than parts, each part has one at most, which ends it: position and stop are
    // then not on the line.
    DEV void begin(const Inputs& c, i32 part, i32 parts, i32 piece_) {
        const i32 units = c.num_chunks * c.heads();
        piece = piece_, position = stop = 0;
        if (units <= parts) {
            if (part >= units) return;
            find(c, part, units, [](const Item& i) { return i.first_chunk; }, [](const Item& i) { return i.num_chunks; });
            const i32 within = part - item.first_chunk * c.heads();
            head = divided(within, item.num_chunks), chunk = within - head * item.num_chunks, stop = 1;
        } else {
            const i32 total = c.cost * c.heads(), each = (u32)total / (u32)parts, more = total - each * parts;  // some parts have one more
            const i32 from = each * part + min(part, more);
            find(c, from, total, [](const Item& i) { return i.start; }, [](const Item& i) { return i.cost; });
            const i32 within = from - item.start * c.heads(), full = cost();
            head = divided(within, item.cost), chunk = divided(within - head * item.cost + full - 1, full);
            if (chunk >= item.num_chunks) chunk = 0, head++;
            if (head >= c.heads()) next_item(c);
            position = item.start * c.heads() + head * item.cost + chunk * full;
            stop = index < c.num_items ? from + each + (part < more) : position;
            if (!any()) return;
        }
        open_chunk();
        opens = true, first_page = first_after = -1;
        find_pages(c, true);
    }
    DEV bool any() const { return position < stop; }

    // The item that has `at`, of what `before` and `own` say that items before it and it itself have for each head. All have `total`.
    template <class Before, class Own> DEV void find(const Inputs& c, i32 at, i32 total, Before before, Own own) {
        const i32 lane = threadIdx.x % 32;
        for (i32 first = max((i32)__fdividef((float)at * c.num_items, total) - 16, 0);;) {
            const Item mine = load_item(c.items + min(first + lane, c.num_items - 1));
            const i32 start = before(mine) * c.heads();
            if (const u32 found = __ballot_sync(FULL, start <= at && at < start + own(mine) * c.heads())) {
                const i32 of = __ffs(found) - 1;
                index = min(first + of, c.num_items - 1), load_ahead(c);
                item = {__shfl_sync(FULL, mine.sequence, of), __shfl_sync(FULL, mine.row, of), __shfl_sync(FULL, mine.context, of), __shfl_sync(FULL, mine.length, of),
                        __shfl_sync(FULL, mine.start, of), __shfl_sync(FULL, mine.cost, of), __shfl_sync(FULL, mine.first_chunk, of), __shfl_sync(FULL, mine.num_chunks, of)};
                return;
            }
            first = __any_sync(FULL, start > at) ? max(first - 32, 0) : first + 32;
        }
    }
    DEV void load_ahead(const Inputs& c) { ahead = load_item(c.items + min(index + 1, c.num_items - 1)); }
    DEV void next_item(const Inputs& c) {
        head = 0, index++, item = ahead;
        load_ahead(c);
    }
    // Of a chunk that is not the head's last.
    DEV i32 cost() const { return item.length / D_COST_KEYS + 1; }
    // Maybe this piece has no keys: key >= end.
    DEV void open_chunk() {
        const i32 first = chunk * item.length, keys = item.length / D_WARPS, last = chunk + 1 == item.num_chunks ? item.context : first + item.length;
        key = first + piece * keys, end = piece == D_WARPS - 1 ? last : min(key + keys, last);
    }

    // Lane i has the block of page first + i.
    static DEV i32 pages_of(const Inputs& c, const Item& of, i32 first) {
        const i32 page = first + threadIdx.x % 32;
        return page * BLOCK_SIZE < of.context ? c.table[(i64)of.sequence * c.table_width + page] : 0;
    }
    // Those around the next key, and ahead of time those that are likely to come then: of this head, the next one or the next sequence.
    DEV void find_pages(const Inputs& c, bool is_other) {
        const i32 first = key / BLOCK_SIZE & ~31;
        if (!is_other && first == first_page) return;
        // What was looked up ahead is the next opening's if it is from page 0 on, else this head's.
        pages = first == first_after && (!is_other || first == 0) ? pages_after : pages_of(c, item, first);
        first_page = first, first_after = first + 32;
        if (first_after * BLOCK_SIZE < item.context) {
            pages_after = pages_of(c, item, first_after);
        } else {
            first_after = 0;
            pages_after = head + 1 == c.heads() ? pages_of(c, ahead, 0) : first == 0 ? pages : pages_of(c, item, 0);
        }
    }

    DEV void advance(const Inputs& c) {
        opens = false;
        key += D_KEYS;
        if (key >= end) {
            position += cost();
            if (++chunk == item.num_chunks) {
                chunk = 0, opens = true;
                position = item.start * c.heads() + ++head * item.cost;
                if (head == c.heads()) next_item(c);
            }
            open_chunk();
        }
        if (key < end) find_pages(c, opens);
        else if (opens) first_page = first_after = -1;
    }

    // All keys of this tile were there before this step.
    DEV bool is_old() const { return any() && (key >= end || min(end, key + D_KEYS) < item.context); }

    // Bring this tile to `stage`, with a note of what it is; then go on. q comes later if the kernel ahead has yet to write it.
    template <bool WITH_Q = true> DEV void fetch(const Inputs& c, const Stage& stage) {
        if (any()) {
            const i32 lane = threadIdx.x % 32, kv = head / D_SPLIT, first = key / BLOCK_SIZE - first_page, keys = max(min(end - key, D_KEYS), 0);
            const bool begins = key == chunk * item.length + piece * (item.length / D_WARPS), ends = key + D_KEYS >= end, ends_head = chunk + 1 == item.num_chunks;
            const i32 after = ends_head ? item.start * c.heads() + (head + 1) * item.cost : position + cost();
            if (lane == 0)
                asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(stage.note()),
                             "r"(keys | opens << 8 | begins << 9 | ends << 10 | (ends && after >= stop) << 11 | chunk << 16),
                             "r"(item.row), "r"(item.first_chunk * c.heads() + head * item.num_chunks), "r"(head | item.num_chunks << 16)
                             : "memory");
            const i32 page = __shfl_sync(FULL, pages, first & 31), page1 = BLOCK_SIZE < D_KEYS ? __shfl_sync(FULL, pages, first + 1 & 31) : 0;
            constexpr int COUNT = D_KEYS * VECTORS;
            const i64 from = ((i64)page * c.num_kv + kv) * (BLOCK_SIZE * HEAD_DIM) + (BLOCK_SIZE > D_KEYS ? key % BLOCK_SIZE : 0) * HEAD_DIM + lane * 8;
            const i64 second = ((i64)page1 * c.num_kv + kv - 1) * (BLOCK_SIZE * HEAD_DIM) + lane * 8;
            const u16 *k = c.k + from, *v = c.v + from, *second_k = c.k + second, *second_v = c.v + second;
#pragma unroll
            for (int i = 0; i < COUNT / 32; i++) {
                const i32 n = i * 32 + lane, row = n / VECTORS;
                const bool real = row < keys, later = BLOCK_SIZE < D_KEYS && row >= BLOCK_SIZE;
                cp_async16_or_zero(stage.keys() + at(row, n % VECTORS), (later ? second_k : k) + i * 256, real);
                cp_async16_or_zero(stage.values() + at(row, n % VECTORS), (later ? second_v : v) + i * 256, real);
            }
            if (WITH_Q && opens) fetch_q(c, stage, item.row, head);
            advance(c);
        }
        cp_async_commit();
    }
};

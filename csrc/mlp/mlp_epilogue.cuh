// What becomes of a product before it is written. Each warp of a consumer warpgroup has 16 rows of a tile, and but for
// the sums of columns no part in what the other warps do.
#pragma once
#include "mlp/mlp_tile.cuh"

// A warp's rows of a tile on their way in and out: in boxes of 64 columns, each of blocks of 16.
struct MlpBoxes {
    using Traits = MlpTraits;
    static constexpr int kBytes = Traits::kBoxRows * Traits::kBoxColumns * 2;
    static constexpr int kBlocks = Traits::kColumns / 16, kBlocksPerBox = kBlocks / Traits::kBoxes;
    static constexpr int kWords = 4 * kBlocksPerBox;  // of a box, in each lane; two elements each

    const MlpArguments& args;
    const uint32_t first, loaded;  // shared addresses: of the boxes, of the barrier that tells of loads
    const int lane = threadIdx.x % 32;
    RingPlace<1> place;

    GK_DEVICE MlpBoxes(const MlpArguments& args, MlpShared& shared, int warp)
        : args(args), first(shared_address(shared.boxes[warp])), loaded(shared_address(&shared.boxes_loaded[warp])) {}

    // This lane's row of a block, for ldmatrix and stmatrix: of a warp's accumulator, registers 8 * block and on.
    GK_DEVICE uint32_t block_at(uint32_t block) const {
        const uint32_t row = first + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        return row + block / kBlocksPerBox * kBytes ^ block % kBlocksPerBox * 32;
    }

    GK_DEVICE void read(int box, uint32_t (&words)[kWords]) const {
#pragma unroll
        for (int j = 0; j < kBlocksPerBox; ++j) ldmatrix_x4(block_at(box * kBlocksPerBox + j), &words[4 * j]);
    }

    GK_DEVICE void write(int box, const uint32_t (&words)[kWords]) const {
#pragma unroll
        for (int j = 0; j < kBlocksPerBox; ++j) stmatrix_x4(block_at(box * kBlocksPerBox + j), &words[4 * j]);
    }

    // All boxes, once what they held has left them.
    GK_DEVICE void start_load(const CUtensorMap* map, MlpTile rows) const {
        if (lane != 0) return;
        bulk_wait_read();
        mbarrier_arrive_expect(loaded, Traits::kBoxes * kBytes);
        for (int box = 0; box < Traits::kBoxes; ++box)
            tma_load_2d(first + box * kBytes, map, loaded, rows.column + box * Traits::kBoxColumns, rows.row);
    }

    GK_DEVICE void wait_loaded() {
        mbarrier_wait(loaded, place.parity());
        place.advance();
        __syncwarp();
    }

    GK_DEVICE void start_store(const CUtensorMap* map, MlpTile rows, int box) const {
        fence_async_proxy();
        __syncwarp();
        if (lane != 0) return;
        const int column = rows.column + box * Traits::kBoxColumns;
        if (rows.row < args.M && column < args.N) tma_store_2d(map, first + box * kBytes, column, rows.row);
        bulk_commit();
    }

    // Until only the `Pending` newest stores still read their boxes.
    template <int Pending>
    GK_DEVICE void wait_stored() const {
        if (lane == 0) bulk_wait_read<Pending>();
        __syncwarp();
    }
};

// The bias of a lane's columns, two in a word.
struct MlpBias {
    uint32_t words[MlpTraits::kColumns / 8] = {};

    GK_DEVICE void load(const MlpArguments& args, int column) {
        if (!args.bias) return;
        const uint16_t* const values = static_cast<const uint16_t*>(args.bias);
        column += threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < MlpTraits::kColumns / 8; ++i, column += 8)
            words[i] = column < args.N ? values[column] | uint32_t(values[column + 1]) << 16 : 0;
    }

    // Of an accumulator's registers 2 * i and 2 * i + 1: two neighbours are of the same columns, in rows 0 and 8.
    template <class T>
    GK_DEVICE float2 of(int i) const {
        return unpack<T>(words[i / 2]);
    }
};

// A warp's epilogue: `during` is called with every step while the tensor cores work at it, `end` when the product is
// there, `finish` when there are no more tiles.

// out = product + bias + epilogue_in
template <class T>
struct MlpLinear {
    static constexpr bool kWeightAcross = false;                    // the weight's rows are columns of the product
    static constexpr int kLoadStep = 2, kWords = MlpBoxes::kWords;  // by that step most boxes have been written
    MlpBoxes boxes;
    MlpBias bias;

    GK_DEVICE MlpLinear(const MlpArguments& args, MlpShared& shared, int warp) : boxes(args, shared, warp) {}

    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        const MlpArguments& args = boxes.args;
        if (step == 0) bias.load(args, rows.column);
        if (args.has_epilogue_in && step == min(kLoadStep, steps - 1)) boxes.start_load(&args.epilogue_in, rows);
    }

    GK_DEVICE void end(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        if (boxes.args.has_epilogue_in)
            boxes.wait_loaded();
        else
            boxes.wait_stored<0>();
        put(rows, total, boxes.args.has_epilogue_in, &boxes.args.out);
    }

    GK_DEVICE void finish() {}

    // product + bias, and with `adds` what the boxes hold, into the boxes and out of them unless `map` is null
    GK_DEVICE void put(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2], bool adds, const CUtensorMap* map) {
#pragma unroll
        for (int box = 0; box < MlpTraits::kBoxes; ++box) {
            uint32_t words[kWords] = {};
            if (adds) boxes.read(box, words);
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const int at = box * kWords + i;
                const float2 b = bias.of<T>(at), r = unpack<T>(words[i]);
                words[i] = pack<T>(total[2 * at] + b.x + r.x, total[2 * at + 1] + b.y + r.y);
            }
            boxes.write(box, words);
            if (map) boxes.start_store(map, rows, box);
        }
    }
};

// side_out = product + bias, out = activation(side_out): the second in shared memory, block by block while the tensor
// cores work at the tile after, where it would cost a third of the time of a product of depth 768.
template <class T, Activation A>
struct MlpActivate : MlpLinear<T> {
    using MlpLinear<T>::boxes;
    MlpTile held = {};                  // the tile that is in the boxes
    uint32_t done = MlpBoxes::kBlocks;  // how many of its blocks are activated

    using MlpLinear<T>::MlpLinear;

    // Spread evenly over the steps but the first, when the copies out of the boxes have just begun.
    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        if (step == 0) this->bias.load(boxes.args, rows.column);
        activate_until(step, steps - 1);
    }

    GK_DEVICE void end(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        finish();
        boxes.template wait_stored<0>();
        this->put(rows, total, false, boxes.args.has_side_out ? &boxes.args.side_out : nullptr);
        held = rows, done = 0;
    }

    GK_DEVICE void finish() { activate_until(1, 1); }

    // Step / steps of the blocks.
    GK_DEVICE void activate_until(int step, int steps) {
#pragma unroll 1
        for (; done < MlpBoxes::kBlocks && int(done) * steps < MlpBoxes::kBlocks * step; ++done) {
            // Stored since: side_out's boxes after this one, out's before.
            if (done % MlpBoxes::kBlocksPerBox == 0) boxes.template wait_stored<MlpTraits::kBoxes - 1>();
            const uint32_t at = boxes.block_at(done);
            uint32_t words[4];
            ldmatrix_x4(at, words);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = unpack<T>(words[i]);
                words[i] = pack<T>(activate<A>(x.x), activate<A>(x.y));
            }
            stmatrix_x4(at, words);
            if (done % MlpBoxes::kBlocksPerBox == MlpBoxes::kBlocksPerBox - 1)
                boxes.start_store(&boxes.args.out, held, done / MlpBoxes::kBlocksPerBox);
        }
    }
};

// out = product * activation'(epilogue_in), side_out = activation(epilogue_in), partials = sums of out's columns
template <class T, Activation A>
struct MlpBackward {
    static constexpr bool kWeightAcross = true;  // the weight's rows are the product's depth
    static constexpr int kLoadStep = 1, kWords = MlpBoxes::kWords, kPerBox = MlpBoxes::kBlocksPerBox;
    static constexpr int kLag = 2;  // boxes: until what went beside has left the one that out goes into
    MlpShared& shared;
    const int warp;
    MlpBoxes boxes;

    GK_DEVICE MlpBackward(const MlpArguments& args, MlpShared& shared, int warp)
        : shared(shared), warp(warp), boxes(args, shared, warp) {}

    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        if (step == min(kLoadStep, steps - 1)) boxes.start_load(&boxes.args.epilogue_in, rows);
    }

    GK_DEVICE void end(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        const MlpArguments& args = boxes.args;
        uint32_t grads[MlpTraits::kBoxes][kWords];
        auto put = [&](int box) {
            boxes.wait_stored<kLag>();
            boxes.write(box, grads[box]);
            boxes.start_store(&args.out, rows, box);
        };
        boxes.wait_loaded();
#pragma unroll
        for (int block = 0; block < MlpBoxes::kBlocks; block += 2) {
            const uint32_t at[2] = {boxes.block_at(block), boxes.block_at(block + 1)};
            uint32_t words[8];
            ldmatrix_x4(at[0], words), ldmatrix_x4(at[1], words + 4);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float* const t = &total[8 * block + 2 * i];
                const float2 x = unpack<T>(words[i]);
                float2 slope;
                const float low = activate_and_slope<A>(x.x, &slope.x), high = activate_and_slope<A>(x.y, &slope.y);
                words[i] = pack<T>(low, high);
                grads[block / kPerBox][block % kPerBox * 4 + i] = pack<T>(t[0] * slope.x, t[1] * slope.y);
            }
            if (args.has_side_out) stmatrix_x4(at[0], words), stmatrix_x4(at[1], words + 4);
            if ((block + 2) % kPerBox != 0) continue;
            const int box = block / kPerBox;
            if (args.has_side_out) boxes.start_store(&args.side_out, rows, box);
            if (box >= kLag) put(box - kLag);
        }
#pragma unroll
        for (int box = MlpTraits::kBoxes - kLag; box < MlpTraits::kBoxes; ++box) put(box);
        if (args.partials) store_sums(rows);
    }

    GK_DEVICE void finish() {}

    // Over the warpgroup's rows, of what was written, rounded: the bias's gradient is made of what the others are.
    GK_DEVICE void store_sums(MlpTile rows) {
        constexpr int kGroup = 1, kPairs = MlpTraits::kBoxColumns / 2;  // kGroup: named barriers, one per group
        const int group = warp / 4, lane = boxes.lane, pair = threadIdx.x % kWarpgroup;
        const int part_row = rows.row / MlpTraits::kGroupRows, column = rows.column + 2 * pair;
#pragma unroll
        for (int box = 0; box < MlpTraits::kBoxes; ++box) {
            float2 sum = {};
#pragma unroll
            for (int row = 0; row < MlpTraits::kBoxRows; ++row) {
                const uint32_t chunk = boxes.first + box * MlpBoxes::kBytes + row * 128 + (lane / 4 ^ row % 8) * 16;
                const float2 values = unpack<T>(load_shared(chunk + lane % 4 * 4));
                sum.x += values.x, sum.y += values.y;
            }
            shared.sums[warp][box * kPairs + lane] = sum;
        }
        named_barrier_sync(kGroup + group, kWarpgroup);
        float2 sum = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 part = shared.sums[group * 4 + i][pair];
            sum.x += part.x, sum.y += part.y;
        }
        if (part_row * MlpTraits::kGroupRows < boxes.args.M && column < boxes.args.N)
            *reinterpret_cast<float2*>(boxes.args.partials + int64_t(part_row) * boxes.args.N + column) = sum;
        named_barrier_sync(kGroup + group, kWarpgroup);
    }
};

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
    static constexpr int kHalf = Traits::kBoxes / 2;  // of a gated MLP the first boxes are the gate's, the others up's

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

    // All boxes, once what they held has left them. up: what goes into the second half of them, unless it is null
    GK_DEVICE void start_load(const CUtensorMap* map, MlpTile rows, const CUtensorMap* up = nullptr) const {
        if (lane != 0) return;
        bulk_wait_read();
        mbarrier_arrive_expect(loaded, Traits::kBoxes * kBytes);
        for (int box = 0; box < Traits::kBoxes; ++box) {
            const int column = rows.column + (up ? box % kHalf : box) * Traits::kBoxColumns;
            tma_load_2d(first + box * kBytes, up && box >= kHalf ? up : map, loaded, column, rows.row);
        }
    }

    GK_DEVICE void wait_loaded() {
        mbarrier_wait(loaded, place.parity());
        place.advance();
        __syncwarp();
    }

    GK_DEVICE void start_store(const CUtensorMap* map, MlpTile rows, int box) const {
        start_store_as(map, rows, box, box);
    }

    // As if it was box `place` of the rows.
    GK_DEVICE void start_store_as(const CUtensorMap* map, MlpTile rows, int box, int place) const {
        fence_async_proxy();
        __syncwarp();
        if (lane != 0) return;
        const int column = rows.column + place * Traits::kBoxColumns;
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
    static constexpr int kWords = MlpTraits::kColumns / 8;
    uint32_t words[kWords] = {};

    // Words `Begin` to `End`, from a column on
    template <int Begin, int End>
    GK_DEVICE void load(const void* bias, int column, int columns) {
        if (!bias) return;
        const uint16_t* const values = static_cast<const uint16_t*>(bias);
        column += threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = Begin; i < End; ++i, column += 8)
            words[i] = column < columns ? values[column] | uint32_t(values[column + 1]) << 16 : 0;
    }

    template <bool Gated>
    GK_DEVICE void load(const MlpArguments& args, int column) {
        load<0, Gated ? kWords / 2 : kWords>(args.bias, column, args.N);
        if (Gated) load<kWords / 2, kWords>(args.up_bias, column, args.N);
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
template <class T, bool Gated = false>
struct MlpLinear {
    static constexpr bool kWeightAcross = false;                    // the weight's rows are columns of the product
    static constexpr bool kGatedTile = Gated;                       // half of its columns are gate's, half are up's
    static constexpr int kTileColumns = MlpTraits::kColumns / (Gated ? 2 : 1);
    static constexpr int kLoadStep = 2, kWords = MlpBoxes::kWords;  // by that step most boxes have been written
    MlpBoxes boxes;
    MlpBias bias;

    GK_DEVICE MlpLinear(const MlpArguments& args, MlpShared& shared, int warp) : boxes(args, shared, warp) {}

    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        const MlpArguments& args = boxes.args;
        if (step == 0) bias.load<false>(args, rows.column);
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

    // product + bias, and with `adds` what the boxes hold, into the boxes and out of them unless `map` is null; what is
    // up's goes elsewhere
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
            if (!map) continue;
            if (Gated && box >= MlpBoxes::kHalf)
                boxes.start_store_as(&boxes.args.up_out, rows, box, box - MlpBoxes::kHalf);
            else
                boxes.start_store(map, rows, box);
        }
    }
};

// side_out = product + bias, out = activation(side_out): the second in shared memory, block by block while the tensor
// cores work at the tile after, where it would cost a third of the time of a product of depth 768. Gated: side_out and
// up_out = products + biases, out = activation(side_out) * up_out
template <class T, Activation A, bool Gated = false>
struct MlpActivate : MlpLinear<T, Gated> {
    using MlpLinear<T, Gated>::boxes;
    static constexpr uint32_t kBlocks = MlpBoxes::kBlocks / (Gated ? 2 : 1);  // of out
    MlpTile held = {};        // the tile that is in the boxes
    uint32_t done = kBlocks;  // how many of its blocks are activated

    using MlpLinear<T, Gated>::MlpLinear;

    // Spread evenly over the steps but the first, when the copies out of the boxes have just begun.
    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        if (step == 0) this->bias.template load<Gated>(boxes.args, rows.column);
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
        for (; done < kBlocks && int(done) * steps < int(kBlocks) * step; ++done) {
            // Stored since: side_out's boxes after this one, out's before.
            if (done % MlpBoxes::kBlocksPerBox == 0) boxes.template wait_stored<MlpTraits::kBoxes - 1>();
            const uint32_t at = boxes.block_at(done);
            uint32_t words[4], ups[4];
            ldmatrix_x4(at, words);
            if (Gated) ldmatrix_x4(boxes.block_at(done + kBlocks), ups);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = unpack<T>(words[i]);
                if constexpr (Gated) {
                    const float2 up = unpack<T>(ups[i]);
                    words[i] = pack<T>(gated<A>(x.x, up.x), gated<A>(x.y, up.y));
                } else {
                    words[i] = pack<T>(activate<A>(x.x), activate<A>(x.y));
                }
            }
            stmatrix_x4(at, words);
            if (done % MlpBoxes::kBlocksPerBox == MlpBoxes::kBlocksPerBox - 1)
                boxes.start_store(&boxes.args.out, held, done / MlpBoxes::kBlocksPerBox);
        }
    }
};

// What the epilogues of both backward passes share.
template <class T, bool Gated>
struct MlpGradient {
    static constexpr bool kWeightAcross = true;  // the weight's rows are the product's depth
    static constexpr bool kGatedTile = false;    // of a gated MLP, too, all columns are of one product
    static constexpr int kTileColumns = MlpTraits::kColumns;
    static constexpr int kLoadStep = 1, kWords = MlpBoxes::kWords, kPerBox = MlpBoxes::kBlocksPerBox;
    MlpShared& shared;
    const int warp;
    MlpBoxes boxes;

    GK_DEVICE MlpGradient(const MlpArguments& args, MlpShared& shared, int warp)
        : shared(shared), warp(warp), boxes(args, shared, warp) {}

    GK_DEVICE void during(int step, int steps, MlpTile rows) {
        if (step == min(kLoadStep, steps - 1)) load(rows);
    }

    GK_DEVICE void load(MlpTile rows) {
        boxes.start_load(&boxes.args.epilogue_in, rows, Gated ? &boxes.args.up : nullptr);
    }

    GK_DEVICE void finish() {}

    // Over the warpgroup's rows, of what was written, rounded: the bias's gradient is made of what the others are.
    GK_DEVICE void store_sums(MlpTile rows) {
        constexpr int kGroup = 1, kPairs = MlpTraits::kBoxColumns / 2;  // kGroup: named barriers, one per group
        const int group = warp / 4, lane = boxes.lane, pair = threadIdx.x % kWarpgroup;
        const int which = Gated ? pair / (kPairs * MlpBoxes::kHalf) : 0;  // of both sums, the gate's and up's
        const int part_row = rows.row / MlpTraits::kGroupRows;
        const int column = rows.column + 2 * (pair - which * kPairs * MlpBoxes::kHalf);
        const int64_t part = int64_t(which) * boxes.args.parts + part_row;
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
            const float2 other = shared.sums[group * 4 + i][pair];
            sum.x += other.x, sum.y += other.y;
        }
        if (part_row * MlpTraits::kGroupRows < boxes.args.M && column < boxes.args.N)
            *reinterpret_cast<float2*>(boxes.args.partials + part * boxes.args.N + column) = sum;
        named_barrier_sync(kGroup + group, kWarpgroup);
    }
};

// out = product * activation'(epilogue_in), side_out = activation(epilogue_in), partials = sums of out's columns
template <class T, Activation A>
struct MlpBackward : MlpGradient<T, false> {
    using Base = MlpGradient<T, false>;
    using Base::boxes, Base::kPerBox, Base::kWords;
    static constexpr int kLag = 2;  // boxes: until what went beside has left the one that out goes into

    using Base::Base;

    GK_DEVICE void end(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        const MlpArguments& args = boxes.args;
        uint32_t grads[MlpTraits::kBoxes][kWords];
        auto put = [&](int box) {
            boxes.template wait_stored<kLag>();
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
        if (args.partials) this->store_sums(rows);
    }
};

// out and up_out = product * the derivatives of activation(epilogue_in) * up by both, side_out = that itself, partials =
// sums of the columns of both. The boxes have room for half of a tile's columns of epilogue_in and up.
template <class T, Activation A>
struct MlpGatedBackward : MlpGradient<T, true> {
    using Base = MlpGradient<T, true>;
    using Base::boxes, Base::kPerBox, Base::kWords;
    static constexpr int kBlocks = MlpBoxes::kBlocks / 2, kHalf = MlpBoxes::kHalf;  // of half a tile

    using Base::Base;

    GK_DEVICE void end(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        half<0>(rows, total);
        rows.column += MlpTraits::kColumns / 2;
        this->load(rows);
        half<1>(rows, total);
    }

    template <int Half>
    GK_DEVICE void half(MlpTile rows, const float (&total)[MlpTraits::kColumns / 2]) {
        const MlpArguments& args = boxes.args;
        uint32_t grads[kWords];  // of a box
        boxes.wait_loaded();
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const uint32_t at = boxes.block_at(block), up_at = boxes.block_at(block + kBlocks);
            uint32_t words[4], ups[4];
            ldmatrix_x4(at, words), ldmatrix_x4(up_at, ups);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const t = &total[8 * (Half * kBlocks + block) + 2 * i];
                const float2 gate = unpack<T>(words[i]), up = unpack<T>(ups[i]);
                float2 slope, up_slope;
                const float low = gated_and_slopes<A>(gate.x, up.x, &slope.x, &up_slope.x);
                const float high = gated_and_slopes<A>(gate.y, up.y, &slope.y, &up_slope.y);
                words[i] = pack<T>(low, high);
                ups[i] = pack<T>(t[0] * up_slope.x, t[1] * up_slope.y);
                grads[block % kPerBox * 4 + i] = pack<T>(t[0] * slope.x, t[1] * slope.y);
            }
            if (args.has_side_out) stmatrix_x4(at, words);
            stmatrix_x4(up_at, ups);
            if ((block + 1) % kPerBox != 0) continue;
            const int box = block / kPerBox;
            if (args.has_side_out) boxes.start_store(&args.side_out, rows, box);
            boxes.start_store_as(&args.up_out, rows, kHalf + box, box);
            boxes.template wait_stored<1>();  // but for up's: until side_out has left this box
            boxes.write(box, grads);
            boxes.start_store(&args.out, rows, box);
        }
        if (args.partials) this->store_sums(rows);
    }
};

// Where the bins of regions of interest lie and which lines of pixels they touch, one axis at a time. Mirrors
// reference/roi_pool.py and cpu/bins.py. Needs scalar_t.
//
// Every mean over a bin is separable: sum over rows and columns of weight_y * weight_x * x, where a line's weight is the
// sum of the hat functions g of the bin's samples on that axis, or 1 for each line of a bin of whole pixels.
using acc_t = accumulator_of<scalar_t>::type;  // coordinates, weights and sums
#include "sampling.cuh"

enum rule_t { MAX, AVG, PS_RFCN, PS_TORCHVISION, PAPER, ALIGNED, LEGACY, RFCN };  // roi_rules.RULES

// What a launch works on (filled as ROI in roi_plan.py): sizes below 2^31, products of them and strides are index_t, strides in
// elements. Input channels of one output channel are `maps_h * maps_w` score maps, 1 where not position sensitive.
struct roi_t {
  index_t R;
  int N, C, H, W, PH, PW;             // C: of the output
  int maps_h, maps_w, classes, part_h, part_w;
  int rule, ratio;                    // ratio: samples of a bin along each axis; 0 or less: as many as it has pixels
  int first_image, images;            // work is done for RoIs of these
  int wide_rois, wide_offset, wide_mask;  // 1: of type acc_t, else scalar_t
  double scale, factor;               // spatial_scale; gamma or trans_std
  index_t rois_r, rois_k;             // rois [R, 5]
  index_t offset_r, offset_k, offset_y, offset_x;      // offset or trans [R, 2*classes, part_h, part_w]
  index_t mask_r, mask_y, mask_x;                      // mask [R, PH, PW]
  index_t pooled_r, pooled_c, pooled_y, pooled_x;      // grad_output [R, C, PH, PW]
  index_t argmax_r, argmax_c, argmax_y, argmax_x;      // argmax [R, C, PH, PW]
  index_t input_n, input_c, input_m, input_y, input_x; // input [images, C, maps, H, W]
  index_t grad_n, grad_c, grad_m, grad_y, grad_x;      // grad_input [images, C, maps, H, W]
};

// Rounded each: contraction would move a bin or a sample.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }

template <typename T>
__device__ __forceinline__ T clip(T v, T low, T high) {
  return v < low ? low : v > high ? high : v;
}

__device__ __forceinline__ acc_t coordinate(const void* array, index_t at, int wide) {
  return wide ? static_cast<const acc_t*>(array)[at] : acc_t(static_cast<const scalar_t*>(array)[at]);
}

__device__ __forceinline__ acc_t corner_of_roi(const roi_t& s, const void* rois, index_t r, int k) {
  return coordinate(rois, r * s.rois_r + k * s.rois_k, s.wide_rois);
}

// The image of a RoI, or -1: the index is no image's, or the RoI is not finite.
__device__ __forceinline__ int image_of(const roi_t& s, const void* rois, index_t r) {
  const acc_t n = corner_of_roi(s, rois, r, 0);
  bool valid = n >= 0 && n < s.N && n == floor(n);
  for (int k = 1; k < 5; k++) {
    const acc_t v = corner_of_roi(s, rois, r, k);
    valid = valid && v - v == 0;
  }
  return valid ? int(n) : -1;
}

// Whether an image is of those that a launch works on.
__device__ __forceinline__ bool in_chunk(const roi_t& s, int image) {
  return image >= s.first_image && image - s.first_image < s.images;
}

// v * scale, cut to where arithmetic with it cannot overflow: as in the reference.
__device__ __forceinline__ acc_t scaled(acc_t v, acc_t scale) {
  const acc_t far = acc_t(1.2676506002282294e30);  // 2^100
  return clip(mul(v, scale), -far, far);
}

struct extent_t {
  acc_t start, size;  // of a RoI on the map
};

__device__ __forceinline__ extent_t extent(int rule, acc_t low, acc_t high, acc_t scale) {
  acc_t start, end, least = 1, last = 0;
  if (rule == PS_RFCN || rule == RFCN) {
    const acc_t half = rule == RFCN ? acc_t(-0.5) : acc_t(0);
    start = add(scaled(round(low), scale), half);
    end = add(scaled(round(high) + 1, scale), half);
    least = acc_t(0.1);
  } else if (rule == ALIGNED || rule == LEGACY) {
    const acc_t half = rule == ALIGNED ? acc_t(-0.5) : acc_t(0);
    start = add(scaled(low, scale), half);
    end = add(scaled(high, scale), half);
  } else {
    start = round(scaled(low, scale));
    end = round(scaled(high, scale));
    last = rule == PS_TORCHVISION ? 0 : 1;  // the last pixel belongs to the RoI
  }
  const acc_t size = end - start + last;
  return {start, rule == ALIGNED || size > least ? size : least};
}

enum { ROWS, COLUMNS };  // the axes

// One bin along one axis. The two of a warp's bin are found by two of its lanes at once, and stand in shared memory.
struct side_t {
  int first, last;         // it touches no line of the map but first <= line < last, and perhaps not all of these
  int points;              // samples that may touch the map; -1: every line from first to last counts in full
  bool nan;                // its shift is not a number
  double low, origin;      // low: the number of the first of these samples; origin: the bin's first pixel ("paper")
  acc_t base, step, number;  // number: what the mean is taken over; RFCN: counted by line_of
  acc_t reach;             // d shift / d offset, in pixels
};

// Eq. 5: [start + floor(i w/k), start + ceil((i+1) w/k)), exactly; beyond 2^40 pixels none of the means is visible.
__device__ __forceinline__ void whole_bin(extent_t roi, int bins, int i, double& first, double& last) {
  const acc_t most = acc_t(1099511627776.0);
  if (roi.size <= most && roi.start <= most && roi.start >= -most) {
    const index_t start = index_t(roi.start), size = index_t(roi.size);
    first = double(start + i * size / bins);
    last = double(start + ((i + index_t(1)) * size + bins - 1) / bins);
  } else {
    const double wide = double(roi.size) / bins;
    first = double(roi.start) + floor(i * wide);
    last = double(roi.start) + ceil((i + 1.0) * wide);
  }
}

// Leaves those of `count` points first, first + spacing, ... that may touch the map: as in the reference. A few points
// are looked at one by one.
__device__ __forceinline__ void keep_touching(side_t& a, double first, double spacing, double count, int length) {
  double low = 0, high = count;
  if (count > 64 && spacing != 0) {
    const double one = (-1 - first) / spacing, other = (length - first) / spacing;
    const double eps = sizeof(acc_t) == 4 ? 1.1920928955078125e-07 : 2.220446049250313e-16;
    double margin = 2 + 8 * eps * fabs(first) / fabs(spacing);
    margin = margin < 100 ? margin : 100;
    low = clip(floor((one < other ? one : other) - margin), 0.0, count);
    high = clip(ceil((one < other ? other : one) + margin) + 1, 0.0, count);
  }
  a.low = low;
  a.points = int(high - low);
}

// The j-th of the points.
__device__ __forceinline__ acc_t point(int rule, const side_t& a, int j) {
  if (rule == PAPER) return add(acc_t(a.origin + (a.low + j)), a.base);
  const acc_t k = a.low == 0 ? acc_t(j) : acc_t(a.low + j);
  if (rule == RFCN) return add(a.base, mul(k, a.step));
  return add(a.base, mul(add(k, acc_t(0.5)), a.step) / a.number);
}

__device__ __forceinline__ int line_below(acc_t v, int length) {
  const index_t line = index_t(clamp_to_image(floor(v), acc_t(length)));
  return line < length ? int(line) : length - 1;
}

// A bin of a RoI, for the channels of one class.
struct bin_t {
  index_t r;
  int cls, ph, pw;
};

// Of R * classes * PH * PW bins: neighbouring numbers are neighbouring bins.
__device__ __forceinline__ bin_t bin_of(const roi_t& s, index_t number) {
  const index_t bins = index_t(s.PH) * s.PW, row = number / bins;
  const int bin = int(number - row * bins);
  return {row / s.classes, int(row % s.classes), bin / s.PW, bin % s.PW};
}

// Which score map a bin reads.
__device__ __forceinline__ int map_of(const roi_t& s, const bin_t& b) {
  return int(index_t(b.ph) * s.maps_h / s.PH * s.maps_w + index_t(b.pw) * s.maps_w / s.PW);
}

__device__ __forceinline__ acc_t modulation_of(const roi_t& s, const void* mask, const bin_t& b) {
  if (mask == nullptr) return 1;
  return coordinate(mask, b.r * s.mask_r + b.ph * s.mask_y + b.pw * s.mask_x, s.wide_mask);
}

// Where grad_output stands for the bin, less the channel within its class.
__device__ __forceinline__ index_t pooled_at(const roi_t& s, const bin_t& b) {
  return b.r * s.pooled_r + index_t(b.cls) * (s.C / s.classes) * s.pooled_c + b.ph * s.pooled_y + b.pw * s.pooled_x;
}

// One axis of a bin of a valid RoI.
__device__ __forceinline__ side_t side_of(const roi_t& s, const void* rois, const void* offset, const bin_t& b,
                                          int axis) {
  const int bins = axis == ROWS ? s.PH : s.PW, i = axis == ROWS ? b.ph : b.pw, length = axis == ROWS ? s.H : s.W;
  const int k = axis == ROWS ? 2 : 1;  // of x1, y1, x2, y2: x stands before y
  const extent_t roi = extent(s.rule, corner_of_roi(s, rois, b.r, k), corner_of_roi(s, rois, b.r, k + 2), acc_t(s.scale));
  side_t a = {0, 0, -1, false, 0, 0, 0, 0, 1, mul(acc_t(s.factor), roi.size)};
  acc_t shift = 0;
  if (offset != nullptr) {
    const index_t at = b.r * s.offset_r + (2 * b.cls + (axis == ROWS)) * s.offset_k +
                       index_t(b.ph) * s.part_h / s.PH * s.offset_y + index_t(b.pw) * s.part_w / s.PW * s.offset_x;
    shift = mul(mul(coordinate(offset, at, s.wide_offset), acc_t(s.factor)), roi.size);
    a.nan = !(shift == shift);
    if (a.nan) return a;
  }
  const acc_t step = roi.size / acc_t(bins), nth = acc_t(i);
  if (s.rule <= PS_TORCHVISION) {
    double first, last;
    if (s.rule == AVG) {
      whole_bin(roi, bins, i, first, last);
    } else if (s.rule == PS_RFCN) {
      first = floor(add(mul(nth, step), roi.start));
      last = ceil(add(mul(nth + 1, step), roi.start));
    } else {
      first = floor(mul(nth, step)) + roi.start;
      last = ceil(mul(nth + 1, step)) + roi.start;
    }
    const double limit = s.rule == PS_TORCHVISION ? length - 1 : length;
    a.first = int(clip(first, 0.0, limit));
    a.last = int(clip(last, 0.0, limit));
    if (a.last < a.first) a.last = a.first;
    a.number = s.rule == AVG ? acc_t(last - first) : acc_t(a.last - a.first);
    return a;
  }
  if (s.rule == RFCN) {
    a.base = add(add(mul(nth, step), roi.start), shift);
    a.step = step / acc_t(s.ratio);
    a.points = s.ratio;
  } else {
    double first, spacing, count;
    if (s.rule == PAPER) {
      whole_bin(roi, bins, i, a.origin, count);
      a.base = shift;
      count -= a.origin;
      a.number = acc_t(count);
      first = a.origin + double(shift);
      spacing = 1;
    } else {
      const acc_t many = ceil(step);
      a.base = add(add(mul(nth, step), roi.start), shift);
      a.step = step;
      a.number = s.ratio > 0 ? acc_t(s.ratio) : many > 0 ? many : acc_t(0);
      count = a.number;
      spacing = count > 0 ? double(step) / count : 0;
      first = double(a.base) + 0.5 * spacing;
    }
    keep_touching(a, first, spacing, count, length);
  }
  if (a.points > 0) {
    const acc_t one = point(s.rule, a, 0), other = point(s.rule, a, a.points - 1);
    a.first = line_below(one < other ? one : other, length);
    a.last = line_below(one < other ? other : one, length) + 2;
    if (a.last > length) a.last = length;
  }
  return a;
}

// What the bin takes from a line; with RFCN `number` becomes how many samples count.
__device__ __forceinline__ line_t line_of(const roi_t& s, const side_t& a, int line, int length, acc_t& number) {
  line_t taken = {0, 0, false, false};
  number = a.number;
  if (a.points < 0) {
    taken.weight = 1;
    taken.counts = line >= a.first && line < a.last;
    return taken;
  }
  int counted = 0;
#pragma unroll 1
  for (int j = 0; j < a.points; j++) {
    const acc_t v = point(s.rule, a, j), size = acc_t(length);
    const axis_t at = s.rule == PAPER ? zeros(v, size) : s.rule == RFCN ? psroi(v, size) : align(v, size);
    counted += at.counts;
    add_sample(taken, at, line, s.rule == PAPER ? length : length - 1);
  }
  if (s.rule == RFCN) number = acc_t(counted);
  return taken;
}

// What is divided by: a bin without pixels or samples is 0.
__device__ __forceinline__ acc_t divisor(acc_t rows, acc_t columns) {
  const acc_t number = rows * columns;
  return number > 1 ? number : acc_t(1);
}

#define WINDOW 32  // lines that a warp lists at a time

struct lists_t {  // of rows or columns, in shared memory
  int line[WINDOW];
  acc_t weight[WINDOW], slope[WINDOW];
};

// The bin that a warp works on, in shared memory.
struct warp_bin_t {
  side_t sides[2];
  lists_t lists[2];
};

// How many rows and columns the lists hold now, and what the mean is taken over; each thread of the warp has these.
struct window_t {
  int rows, columns;
  acc_t rows_in_all, columns_in_all;
};

__device__ __forceinline__ void find_sides(const roi_t& s, const void* rois, const void* offset, const bin_t& b,
                                           warp_bin_t& own) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the last bin's are used up
  if (lane < 2) own.sides[lane] = side_of(s, rois, offset, b, lane);
  __syncwarp();  // they are there
}

// Lists the lines of a window of one side, packed; a warp's lanes look at one each. Returns how many they are.
__device__ __forceinline__ int list_lines(const roi_t& s, int axis, int first, bool slopes, warp_bin_t& own,
                                          acc_t& number) {
  const int lane = threadIdx.x % 32, line = first + lane;
  const side_t& a = own.sides[axis];
  const line_t taken = line_of(s, a, line, axis == ROWS ? s.H : s.W, number);
  const bool listed = line < a.last && (taken.counts || (slopes && taken.moves));
  const unsigned listing = __ballot_sync(0xffffffffu, listed);
  if (listed) {
    lists_t& to = own.lists[axis];
    const int place = __popc(listing & ((1u << lane) - 1));
    to.line[place] = line;
    to.weight[place] = taken.weight;
    to.slope[place] = taken.slope;
  }
  return __popc(listing);
}

// Calls use() for each window of a bin's lines, which are then in the lists. Where one window holds them all they are
// listed once, with `first`, and stay.
template <typename Use>
__device__ __forceinline__ void over_windows(const roi_t& s, bool slopes, bool first, warp_bin_t& own, window_t& window,
                                             Use use) {
  const int top = own.sides[ROWS].first, bottom = own.sides[ROWS].last;
  const int left = own.sides[COLUMNS].first, right = own.sides[COLUMNS].last;
  const bool one = bottom - top <= WINDOW && right - left <= WINDOW;
#pragma unroll 1
  for (int y = top; y < bottom; y += WINDOW)
#pragma unroll 1
    for (int x = left; x < right; x += WINDOW) {
      if (first || !one) {
        __syncwarp();  // the lists are used up
#pragma unroll 1
        for (int axis = ROWS; axis <= COLUMNS; axis++) {
          acc_t in_all;
          const int count = list_lines(s, axis, axis == ROWS ? y : x, slopes, own, in_all);
          (axis == ROWS ? window.rows : window.columns) = count;
          (axis == ROWS ? window.rows_in_all : window.columns_in_all) = in_all;
        }
        __syncwarp();  // the lists are there
      }
      use();
    }
}

// The one sampler: bilinear interpolation (Eq. 3, 4) under each border rule. Mirrors reference/sampling.py.
//
//   x(p) = sum_q G(q, p) x(q),   G(q, p) = g(q_y, p_y) g(q_x, p_x),   g(a, b) = max(0, 1 - |a - b|)
//
// A border rule acts on each axis alone. Needs acc_t.
struct axis_t {
  acc_t position;  // where the coordinate samples, after clamping
  bool counts;     // the value is not 0 by the rule
  bool moves;      // its right-hand derivative is that of the cell floor(position)
};

// Pixels outside count as 0: Eq. 3 with sums over the image's pixels.
__device__ __forceinline__ axis_t zeros(acc_t v, acc_t size) {
  return {v, v > -1 && v < size, v >= -1 && v < size};
}

// 0 outside the image, clamped within the last pixel.
__device__ __forceinline__ axis_t msra(acc_t v, acc_t size) {
  return {v < size - 1 ? v : size - 1, v >= 0 && v < size, v >= 0 && v < size - 1};
}

__device__ __forceinline__ acc_t clamp_to_image(acc_t v, acc_t size) {
  return v > 0 ? (v < size - 1 ? v : size - 1) : acc_t(0);
}

// Clamped to the image.
__device__ __forceinline__ axis_t edge(acc_t v, acc_t size) {
  return {clamp_to_image(v, size), v == v, v >= 0 && v < size - 1};
}

// 0 more than a pixel outside, else clamped to the image.
__device__ __forceinline__ axis_t align(acc_t v, acc_t size) {
  return {clamp_to_image(v, size), v >= -1 && v <= size, v >= 0 && v < size - 1};
}

// Not counted more than half a pixel outside, else clamped to the image; still at whole pixels (deformable R-FCN).
__device__ __forceinline__ axis_t psroi(acc_t v, acc_t size) {
  // `v < size`: from 2^24 on size - 0.5 is no float32, and rounds up to size
  return {clamp_to_image(v, size), v >= -0.5f && v < size && v <= size - 0.5f,
          v > 0 && v < size - 1 && v != floor(v)};
}

enum border_t { ZEROS, MSRA, EDGE, ALIGN };

__device__ __forceinline__ axis_t axis(int border, acc_t v, int size) {
  if (border == ZEROS) return zeros(v, acc_t(size));
  if (border == MSRA) return msra(v, acc_t(size));
  if (border == EDGE) return edge(v, acc_t(size));
  return align(v, acc_t(size));
}

// The cell of a position. Corner q of 0..3 is pixel (y + q/2, x + q%2).
struct corners_t {
  int y, x;       // the cell's first pixel, possibly -1
  acc_t ly, lx;   // g(y + 1, p_y) and g(x + 1, p_x)
  bool inside_y0, inside_y1, inside_x0, inside_x1;  // rows y, y+1 and columns x, x+1 are of the image
  bool value, moves_y, moves_x;  // else the value, its derivative in y, in x are 0 by the rule
  bool nan;       // a coordinate is not a number: all three are NaN

  __device__ __forceinline__ unsigned inside() const {  // bit q: corner q is a pixel of the image
    return (inside_y0 && inside_x0) | (inside_y0 && inside_x1) << 1 | (inside_y1 && inside_x0) << 2 |
           (inside_y1 && inside_x1) << 3;
  }
};

__device__ __forceinline__ corners_t corners(acc_t y, acc_t x, int height, int width, int border) {
  const axis_t row = axis(border, y, height), column = axis(border, x, width);
  corners_t at;
  at.nan = !(y == y && x == x);
  at.value = row.counts && column.counts && !at.nan;
  // moving y changes the sample where y moves and x is where samples count; x = -1 of "zeros" weighs 0 by itself
  at.moves_y = row.moves && (column.counts || column.moves) && !at.nan;
  at.moves_x = column.moves && (row.counts || row.moves) && !at.nan;
  const bool near = at.value || at.moves_y || at.moves_x;
  const acc_t py = near ? row.position : acc_t(0), px = near ? column.position : acc_t(0);
  const acc_t y0 = floor(py), x0 = floor(px);
  at.ly = py - y0;
  at.lx = px - x0;
  at.y = int(y0);
  at.x = int(x0);
  if (border != ZEROS) {  // indices are clamped too: from 2^24 on size - 1 may be no float32
    if (at.y >= height || (near && y > row.position)) at.y = height - 1, at.ly = 0;
    if (at.x >= width || (near && x > column.position)) at.x = width - 1, at.lx = 0;
  }
  at.inside_y0 = near && at.y >= 0 && at.y < height;
  at.inside_y1 = near && at.y + 1 < height;
  at.inside_x0 = at.x >= 0 && at.x < width;
  at.inside_x1 = at.x + 1 < width;
  return at;
}

// G(q, p) of corner q.
__device__ __forceinline__ acc_t corner_weight(acc_t ly, acc_t lx, int q) {
  return (q / 2 ? ly : 1 - ly) * (q % 2 ? lx : 1 - lx);
}

// What the samples of one axis take from one line of pixels: the sums of g(line, p) and of its right-hand derivative.
struct line_t {
  acc_t weight, slope;
  bool counts, moves;  // some sample that counts, that moves, has the line in its cell
};

// Adds what one sample takes from `line`. `last`: the line that no clamped position lies past.
__device__ __forceinline__ void add_sample(line_t& to, const axis_t& at, int line, int last) {
  if (!(at.counts || at.moves)) return;  // the position may be anywhere
  const acc_t cell = floor(at.position), l = at.position - cell;
  const int first = cell < last ? int(cell) : last;  // from 2^24 on size - 1 may be no float32
  const int below = line - first;  // 0: the cell's first line, 1: its second
  if (below != 0 && below != 1) return;
  if (at.counts) to.weight += below ? l : 1 - l;
  if (at.moves) to.slope += below ? 1 : -1;
  to.counts |= at.counts;
  to.moves |= at.moves;
}

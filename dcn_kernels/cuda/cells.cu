// Which cell each sample lies in: what gather.cu sorts by.
#include "common.cuh"
#include "taps.cuh"

#define THREADS 256

// keys[sample]: the cell, numbered [image, og, y + 1, x + 1] (a cell may begin at -1); past the last one if the sample
// reads no pixel. A thread owns a sample.
KERNEL(cells, THREADS)
(const offset_t* __restrict__ offset,  // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,      // [images, OG*KH*KW, OH, OW] by strides, or null
 index_t* __restrict__ keys,           // [images*pixels, KH*KW, OG]
 acc_t* __restrict__ placed,           // [images*pixels, KH*KW, OG, 3]: ly, lx and m
 const conv_t s) {
  const int slots = s.KH * s.KW * s.OG;
  const int samples = s.images * s.pixels * slots;  // below 2^31: the launcher's tiles are no larger
  for (index_t i = index_t(blockIdx.x) * THREADS + threadIdx.x; i < samples; i += index_t(gridDim.x) * THREADS) {
    const sample_t sample = sample_of(s, int(i) / slots, int(i) % slots);
    const corners_t at = corners_of(s, offset, sample);
    const index_t plane = index_t(sample.image) * s.OG + sample.og;
    const index_t cell = (plane * (s.H + 1) + at.y + 1) * (s.W + 1) + at.x + 1;
    keys[i] = at.inside() ? cell : index_t(s.images) * s.OG * (s.H + 1) * (s.W + 1);
    placed[3 * i] = at.ly;
    placed[3 * i + 1] = at.lx;
    placed[3 * i + 2] = modulation_of(s, mask, sample);
  }
}

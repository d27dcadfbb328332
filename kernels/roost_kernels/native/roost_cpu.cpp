// C interface of the CPU kernels, for native_library.py. No exception leaves it: what can fail for
// want of memory returns null.
#include "decoder.h"
#include "sampling.h"

using namespace roost;

extern "C" {

// Instruction set this library was compiled for: 3 AVX512-BF16, 2 AVX-512, 1 AVX2, 0 other.
int roost_instruction_set() {
#if defined(ROOST_BF16)
  return 3;
#elif defined(ROOST_AVX512)
  return 2;
#elif defined(ROOST_AVX2)
  return 1;
#else
  return 0;
#endif
}

void* roost_allocate(int64_t num_bytes) {
  try {
    return new Memory(num_bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void* roost_address(void* memory) { return static_cast<Memory*>(memory)->as<uint8_t>(); }

void roost_free(void* memory) { delete static_cast<Memory*>(memory); }

int64_t roost_packed_bytes(int n, int k, Format format) {
  return static_cast<int64_t>((n + kLanes - 1) / kLanes * panel_bytes(format, k));
}

// Pack `n` stored rows of `k` weights, each in its own encoding, as panels; null rows are zeros.
// 0 if a number is beyond the format's range, else 1.
int roost_pack(const uint8_t* const* rows, const Encoding* encodings, int n, int k, Format format,
               uint8_t* out, int num_threads) {
  Team team(num_threads);
  std::atomic<bool> fits = true;
  const int num_panels = (n + kLanes - 1) / kLanes;
  team.run(1, [&](int thread) {
    std::vector<float> scratch(k);
    team.share(0, thread, num_panels, [&](int panel) {
      const int first = panel * kLanes;
      if (!pack_panel(format, encodings + first, rows + first, k, std::min(kLanes, n - first),
                      out + panel * panel_bytes(format, k), scratch.data()))
        fits = false;
    });
  });
  return fits;
}

void roost_decode_rows(const uint8_t* const* rows, int n, int k, Encoding encoding, float* out) {
  for (int i = 0; i < n; i++) decode_row(encoding, rows[i], k, out + static_cast<size_t>(i) * k);
}

// out (rows, n) = x (rows, k) times the matrix transposed. For tests and measurements; `x` is
// rounded to bf16 first where the format needs it.
void roost_multiply(const Matrix* w, const float* x, int num_rows, float* out, int out_width) {
  const int k = w->k;
  std::vector<bf16> rounded(static_cast<size_t>(num_rows) * k);
  std::vector<GroupSum> sums(static_cast<size_t>(num_rows) * (k / kGroup));
  for (size_t i = 0; i < rounded.size(); i++) rounded[i] = to_bf16(x[i]);
  for (size_t i = 0; i < sums.size(); i++) sums[i] = sum_group(&rounded[i * kGroup]);
  multiply(*w, 0, w->num_panels(), {x, rounded.data(), sums.data(), k}, 0, num_rows,
           {Output::Kind::kStore, out, out_width, nullptr, false});
}

void* roost_decoder_new(const DecoderConfig* config, const ModelWeights* model, int num_threads) {
  try {
    return new Decoder(*config, *model, num_threads);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void roost_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// 1, or 0 if it was interrupted.
int roost_decoder_step(void* decoder, const int32_t* tokens, int num_tokens,
                       const StepChunk* chunks, int num_chunks, float* logits, int logits_width) {
  return static_cast<Decoder*>(decoder)->step(tokens, num_tokens, chunks, num_chunks, logits,
                                              logits_width);
}

// From any thread, while another one is in `roost_decoder_step`.
void roost_decoder_interrupt(void* decoder) { static_cast<Decoder*>(decoder)->interrupt(); }

void roost_decoder_copy_block(void* decoder, int block, uint8_t* elements, int into_cache) {
  static_cast<Decoder*>(decoder)->copy_block(block, elements, into_cache != 0);
}

// One token for each row of logits (rows, width), or kNotANumber.
void roost_sample(const float* logits, int num_rows, int64_t width, int vocab_size,
                  const SamplingRow* rows, int32_t* tokens) {
  Sampler sampler;
  for (int i = 0; i < num_rows; i++)
    tokens[i] = sampler.sample(logits + i * width, vocab_size, rows[i]);
}

}  // extern "C"

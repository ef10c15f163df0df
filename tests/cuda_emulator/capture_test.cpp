// Calls an op, then once more in a capture, and prints what the capture refused.
#include <cstdio>
#include <vector>

#include "vit.h"

extern "C" {
void vit_emulator_capture(int on);
const char* vit_emulator_refused();
}

int main() {
  std::vector<float> x(100, 1.0f), y(100);
  vit::GeluFwd p{};
  p.x = x.data();
  p.y = y.data();
  p.n = 100;
  p.activation = vit::Activation::gelu;
  p.dtype = vit::DType::float32;
  vit::gelu_fwd(p);
  vit_emulator_capture(1);
  vit::gelu_fwd(p);
  std::printf("refused: %s\n", vit_emulator_refused());
}

// Tells Python what was launched: one line an instance, "count <tab> file <tab> kernel <tab> instance".
#include "launches.h"

extern "C" const char* rk_cuda_on_host_launches() {
  static std::string lines;
  lines.clear();
  for (const auto* launches : rk_cuda_on_host::Launches::all()) {
    lines += std::to_string(launches->count) + "\t" + launches->site.file + "\t" + launches->site.kernel + "\t" +
             launches->instance + "\n";
  }
  return lines.c_str();
}

// Which kernels were launched. Every instance of a launch site that was compiled has an entry from the start, so what
// was never launched is known as well.
#pragma once

#include <cxxabi.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <typeinfo>
#include <vector>

namespace rk_cuda_on_host {

struct Site {
  const char *file, *kernel;  // the kernel as RK_LAUNCH was given it
};

struct Launches {
  Site site;
  std::string instance;  // the function that launches it, with template arguments
  std::atomic<int64_t> count = 0;

  static std::vector<Launches*>& all() {
    static std::vector<Launches*> all;
    return all;
  }
  Launches(Site site, const char* mangled) : site(site) {
    char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    instance = name ? name : mangled;
    std::free(name);
    all().push_back(this);
  }
};

// GetSite is the type of a lambda in the macro, so there is one of it for each instance of the function around it.
template <class GetSite>
struct LaunchesOf {
  static inline Launches launches{GetSite{}(), typeid(GetSite).name()};
};

}  // namespace rk_cuda_on_host

// The floating-point environment that the verbs compute in.
#pragma once

#include <cfenv>

namespace hotgraft::cpu {

// The default one for as long as this lives: what a program sets for its own speed (such as
// torch.set_flush_denormal, which makes subnormal numbers zero) must not change a result.
class DefaultEnvironment {
  public:
    DefaultEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultEnvironment() { std::fesetenv(&saved_); }
    DefaultEnvironment(const DefaultEnvironment&) = delete;
    DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

}  // namespace hotgraft::cpu

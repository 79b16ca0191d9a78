// Environment variables that choose between kernels. No torch here.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace ran {

// The value of `name`, one of `choices`; the first of them where it is not set. Throws std::invalid_argument, which
// Python sees as ValueError, for another value.
inline std::string environment_choice(const char* name, std::initializer_list<const char*> choices) {
  const char* set = std::getenv(name);
  if (!set || !*set) return *choices.begin();
  std::string known;
  for (const char* choice : choices) {
    if (std::string(set) == choice) return choice;
    known += (known.empty() ? "" : ", ") + std::string(choice);
  }
  throw std::invalid_argument(std::string(name) + " must be one of " + known + ", got '" + set + "'");
}

}  // namespace ran

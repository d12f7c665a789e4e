# Read by CMake right after llama.cpp's own project() line (CMAKE_PROJECT_llama.cpp_INCLUDE).
#
# llama-cpp-python forces LLAMA_BUILD_COMMON on in the cache, although its wheel uses none of that
# library. A plain variable shadows the cache, which leaves out more than half of the compile time.
set(LLAMA_BUILD_COMMON OFF)

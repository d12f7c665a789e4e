# Read by CMake right after llama.cpp's own project() line (CMAKE_PROJECT_llama.cpp_INCLUDE).

# The same compiler flags as in our own library, for the same reasons.
include(${CMAKE_CURRENT_LIST_DIR}/../../firmware_scripts/llama_cpp_minimal.cmake)

# The one thing that llama-server needs and our library does not.
set(LLAMA_BUILD_COMMON ON)

# Read by CMake right after llama.cpp's own project() line (CMAKE_PROJECT_llama.cpp_INCLUDE).

# llama-cpp-python forces LLAMA_BUILD_COMMON on in the cache, although its wheel uses none of that
# library. A plain variable shadows the cache, which leaves out more than half of the compile time.
set(LLAMA_BUILD_COMMON OFF)

# ggml's AMX kernels of this version load an invalid tile configuration when optimised by GCC, and crash the process
# at the first prompt (llama.cpp issue 20824; its pull request 26954 has the cause). AVX-512 serves instead.
include(CheckCXXCompilerFlag)
foreach(flag -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
    string(MAKE_C_IDENTIFIER "HAVE${flag}" have)
    check_cxx_compiler_flag(${flag} ${have})
    if(${have})
        add_compile_options(${flag})
    endif()
endforeach()

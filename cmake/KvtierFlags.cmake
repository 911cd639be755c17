# kvtier_flags: what every target of ours is compiled with. Linked PRIVATE, so nothing of it leaks out.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(THREADS_PREFER_PTHREAD_FLAG ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_package(Threads REQUIRED)

add_library(kvtier_flags INTERFACE)
target_compile_definitions(kvtier_flags INTERFACE KVTIER_VERSION="${PROJECT_VERSION}")
# No -march here: wheels run on any x86-64 or arm64; faster instructions are chosen by target attributes.
target_compile_options(kvtier_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # gcc 12 at -O3 sees an overlap in `"text" + std::move(string)` where there is none (gcc bug 105651).
  target_compile_options(kvtier_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
if(KVTIER_WERROR)
  target_compile_options(kvtier_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror>
    $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=-Werror>)
endif()
if(KVTIER_SANITIZE)
  target_compile_options(kvtier_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${KVTIER_SANITIZE};-fno-sanitize-recover=all;-fno-omit-frame-pointer>)
  # A third of what a test takes to compile are checks for undefined behaviour in the test itself.
  target_compile_options(kvtier_flags INTERFACE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:$<TARGET_PROPERTY:KVTIER_IS_TEST>>>:-fno-sanitize=undefined>)
  target_link_options(kvtier_flags INTERFACE -fsanitize=${KVTIER_SANITIZE})
endif()

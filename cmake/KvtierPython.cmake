# The Python module kvtier._core, from csrc/bindings. It sees the engine and, through it, what lies below, and the replay.
file(GLOB kvtier_binding_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/bindings/*.cpp")
if(NOT kvtier_binding_sources)
  return()
endif()

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT pybind11_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)

# NO_EXTRAS: its link-time optimisation would cover the bindings only, and gcc warns there about its own code.
pybind11_add_module(_core MODULE NO_EXTRAS ${kvtier_binding_sources})
target_link_libraries(_core PRIVATE kvtier_flags kvtier::engine kvtier::replay)
install(TARGETS _core LIBRARY DESTINATION kvtier)
if(SKBUILD)
  target_compile_options(_core PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)  # for ccache
  target_precompile_headers(_core PRIVATE <pybind11/numpy.h> <pybind11/pybind11.h> <pybind11/stl.h>)
else()
  # In a C++ developer's tree the module stands in compile_commands.json (clang-tidy reads it); pip builds it.
  set_target_properties(_core PROPERTIES EXCLUDE_FROM_ALL ON)
endif()

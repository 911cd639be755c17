# Compiles through ccache when it is installed and no launcher was chosen.
find_program(KVTIER_CCACHE ccache)
mark_as_advanced(KVTIER_CCACHE)
if(KVTIER_CCACHE)
  # Tests and bindings have precompiled headers, which ccache caches only when told that it may (its manual,
  # "Precompiled headers").
  set(kvtier_launcher "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros "${KVTIER_CCACHE}")
  foreach(language CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER "${kvtier_launcher}")
    endif()
  endforeach()
endif()

# kvtier_layer(<name> [DEPENDS <layer>...]) defines the static library kvtier_<name>, alias kvtier::<name>,
# from csrc/<name>/*.cpp (and *.cu in a CUDA build).
#
# Only csrc/<name>/include goes on the include path, and DEPENDS names every lower layer it may see: an
# include of any other layer does not compile. A layer without sources is skipped, also as a dependency.
function(kvtier_layer name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "DEPENDS")
  set(dir "${PROJECT_SOURCE_DIR}/csrc/${name}")
  file(GLOB sources CONFIGURE_DEPENDS "${dir}/*.cpp")
  if(KVTIER_HAVE_CUDA)
    file(GLOB cuda_sources CONFIGURE_DEPENDS "${dir}/*.cu")
    list(APPEND sources ${cuda_sources})
  endif()
  if(NOT sources)
    return()
  endif()

  set(target kvtier_${name})
  add_library(${target} STATIC ${sources})
  add_library(kvtier::${name} ALIAS ${target})
  if(KVTIER_SANITIZE)
    # Most of what these builds take is headers, read and instantiated again for every file. What is not in the
    # main file gcc takes for a header, where nothing unnamed belongs: that warning is for the other builds.
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-subobject-linkage>)
  endif()
  target_include_directories(${target} PUBLIC "${dir}/include")
  target_link_libraries(${target} PRIVATE kvtier_flags PUBLIC Threads::Threads)
  foreach(lower IN LISTS arg_DEPENDS)
    if(TARGET kvtier_${lower})
      target_link_libraries(${target} PUBLIC kvtier::${lower})
    endif()
  endforeach()
endfunction()

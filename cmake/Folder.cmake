# One rule for every folder of src/: all *.cc become a static library `spillway_<name>`, all *_test.cc one
# GoogleTest program `<name>_test` (one CTest entry each), so that a new file needs no build edit.

find_package(PkgConfig REQUIRED)

add_library(spillway_flags INTERFACE)
target_compile_options(spillway_flags INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wno-missing-field-initializers -fno-omit-frame-pointer
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<COMPILE_LANGUAGE:CXX>>:-Wno-interference-size -fcoroutines>)
target_include_directories(spillway_flags INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_SOURCE_DIR}/include)
if(SPILLWAY_SANITIZE)
  # alignment: liburcu's headers read list nodes through unaligned types.
  target_compile_options(spillway_flags INTERFACE -fsanitize=${SPILLWAY_SANITIZE} -fno-sanitize-recover=all
    -fno-sanitize=alignment)
  if(SPILLWAY_FUZZ)  # without it libFuzzer sees no branch of the code under test, only of the fuzzer's own file
    target_compile_options(spillway_flags INTERFACE -fsanitize=fuzzer-no-link)
  endif()
  target_link_options(spillway_flags INTERFACE -fsanitize=${SPILLWAY_SANITIZE})
endif()
find_program(MOLD mold)
if(MOLD AND NOT SPILLWAY_SANITIZE)
  target_link_options(spillway_flags INTERFACE -fuse-ld=mold)
endif()

# spillway_folder(<name> [DEPS lib...] [TEST_DEPS lib...])
function(spillway_folder name)
  cmake_parse_arguments(ARG "" "" "DEPS;TEST_DEPS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc ${CMAKE_CURRENT_SOURCE_DIR}/*/*.cc)
  set(tests ${sources})
  list(FILTER sources EXCLUDE REGEX "_test\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  if(sources)
    add_library(spillway_${name} STATIC ${sources})
    target_link_libraries(spillway_${name} PUBLIC spillway_flags ${ARG_DEPS})
  else()
    add_library(spillway_${name} INTERFACE)
    target_link_libraries(spillway_${name} INTERFACE spillway_flags ${ARG_DEPS})
  endif()
  if(tests AND BUILD_TESTING)
    spillway_test(${name}_test SOURCES ${tests} DEPS spillway_${name} ${ARG_TEST_DEPS})
  endif()
endfunction()

# spillway_test(<name> SOURCES file... DEPS lib... [LABELS l...] [TIMEOUT s]): one GoogleTest program, one CTest entry.
function(spillway_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  find_package(GTest REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  if(NOT TARGET unit_tests)
    add_custom_target(unit_tests)  # everything the sanitizer runs need, and no more
  endif()
  add_dependencies(unit_tests ${name})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} spillway_flags GTest::gmock GTest::gtest GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  if(SPILLWAY_SANITIZE STREQUAL "thread")
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 4")  # TSan is that much slower
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS};unit")
endfunction()

# spillway_program(<name> SOURCES file... DEPS lib...): a program in <build>/bin.
function(spillway_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE spillway_flags ${ARG_DEPS})
endfunction()

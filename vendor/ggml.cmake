# ggml as pinned in ggml.toml, with our hooks in its CUDA back end.
#
# Sets GGML_SOURCE, PYDFLASH_CUDA_ENABLED, PYDFLASH_BUILD_INFO and PYDFLASH_ARCH_FLAGS; defines the targets ggml-base,
# ggml-cpu and (when enabled) ggml-cuda, with PYDFLASH_CUDA_TARGETS, which also check it.

if(PYDFLASH_GGML_SOURCE)
  set(GGML_SOURCE "${PYDFLASH_GGML_SOURCE}")
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/fetch.py" "${CMAKE_CURRENT_LIST_DIR}/ggml.toml"
            "${CMAKE_CURRENT_SOURCE_DIR}/.cache"
    OUTPUT_VARIABLE GGML_SOURCE OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${GGML_SOURCE}/src/ggml.c")
  message(FATAL_ERROR "${GGML_SOURCE} holds no ggml source (src/ggml.c); set PYDFLASH_GGML_SOURCE to the folder that does")
endif()

# --- Is CUDA wanted, and is it there? -----------------------------------------------------------------------------
find_package(CUDAToolkit QUIET)
find_program(PYDFLASH_NVCC nvcc HINTS "${CUDAToolkit_BIN_DIR}" /usr/local/cuda/bin)
file(GLOB PYDFLASH_GPUS /dev/nvidia[0-9]* /dev/dxg)
set(PYDFLASH_CUDA_ENABLED OFF)
if(PYDFLASH_CUDA STREQUAL "ON")
  if(NOT PYDFLASH_NVCC)
    message(FATAL_ERROR "PYDFLASH_CUDA=ON, but no nvcc was found; install a CUDA toolkit or put nvcc on PATH")
  endif()
  set(PYDFLASH_CUDA_ENABLED ON)
  set(PYDFLASH_CUDA_WHY "asked for with PYDFLASH_CUDA=ON")
elseif(PYDFLASH_CUDA STREQUAL "OFF")
  set(PYDFLASH_CUDA_WHY "switched off with PYDFLASH_CUDA=OFF")
elseif(PYDFLASH_NVCC AND PYDFLASH_GPUS)
  set(PYDFLASH_CUDA_ENABLED ON)
  set(PYDFLASH_CUDA_WHY "a toolkit and an NVIDIA GPU were found")
elseif(PYDFLASH_NVCC)
  set(PYDFLASH_CUDA_WHY "a toolkit was found but no NVIDIA GPU")
else()
  set(PYDFLASH_CUDA_WHY "no CUDA toolkit (nvcc) was found")
endif()
if(NOT PYDFLASH_CUDA_KERNELS MATCHES "^(needed|all)$")
  message(FATAL_ERROR "PYDFLASH_CUDA_KERNELS is \"${PYDFLASH_CUDA_KERNELS}\"; choose needed or all")
endif()
if(PYDFLASH_CUDA_ENABLED)
  message(STATUS "pydflash: CUDA back end ON (${PYDFLASH_CUDA_WHY}); choose with PYDFLASH_CUDA=ON|OFF")
else()
  message(STATUS "pydflash: CPU only, ${PYDFLASH_CUDA_WHY}; choose with PYDFLASH_CUDA=ON|OFF")
endif()

# --- ggml's own options -------------------------------------------------------------------------------------------
set(BUILD_SHARED_LIBS ON)
set(GGML_BUILD_TESTS OFF)
set(GGML_BUILD_EXAMPLES OFF)
set(GGML_CCACHE OFF)
set(GGML_OPENMP OFF)       # ggml's own thread pool; no second OpenMP runtime beside numpy's or torch's
set(GGML_LLAMAFILE OFF)    # its f16/f32 kernels round differently at one row than at several (D8)
set(GGML_CUDA ${PYDFLASH_CUDA_ENABLED})
set(GGML_CUDA_GRAPHS ON)   # off by default outside llama.cpp
set(GGML_CUDA_NCCL OFF)
set(GGML_CUDA_FA_QUANTS "f16-f16;bf16-bf16;q4_0-q4_0;q8_0-q8_0;q4_0-q8_0;q8_0-q4_0" CACHE STRING
    "K-V type pairs of ggml's vector attention, or 'all'; read with PYDFLASH_CUDA_KERNELS=all only")
if(PYDFLASH_CUDA_KERNELS STREQUAL "needed")
  set(GGML_CUDA_FA_QUANTS "f16-f16")  # the pair that ggml always names; no vector attention is built
endif()
if(PYDFLASH_CUDA_ENABLED AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${PYDFLASH_NVCC}")
endif()
add_subdirectory("${GGML_SOURCE}" ggml EXCLUDE_FROM_ALL)

# One plain file per library, found through $ORIGIN: wheels cannot hold version symlinks.
foreach(library ggml-base ggml-cpu ggml-cuda)
  if(TARGET ${library})
    set_property(TARGET ${library} PROPERTY VERSION)
    set_property(TARGET ${library} PROPERTY SOVERSION)
  endif()
endforeach()
# The instruction sets of ggml's CPU back end (-march=native unless GGML_NATIVE is OFF), for our own code too.
get_target_property(PYDFLASH_ARCH_FLAGS ggml-cpu COMPILE_OPTIONS)
list(FILTER PYDFLASH_ARCH_FLAGS INCLUDE REGEX "^(-m|-[DU]__ARM_)")

# --- What the libraries export: no C++ name, or a libstdc++ inside takes the place of another library's ------------
foreach(library ggml-base ggml-cpu ggml-cuda)
  if(TARGET ${library})
    set(EXPORTS "${CMAKE_CURRENT_LIST_DIR}/exports.map")
    target_link_options(${library} PRIVATE "LINKER:--version-script=${EXPORTS}" "LINKER:-z,defs")
    set_property(TARGET ${library} APPEND PROPERTY LINK_DEPENDS "${EXPORTS}")
  endif()
endforeach()

# --- Our operations: one folder for each module of pydflash/ops, which include one another by name ---------------
set(PYDFLASH_EXT "${CMAKE_CURRENT_SOURCE_DIR}/ggml_ext")
file(GLOB PYDFLASH_EXT_FOLDERS CONFIGURE_DEPENDS LIST_DIRECTORIES true "${PYDFLASH_EXT}/*")
list(FILTER PYDFLASH_EXT_FOLDERS EXCLUDE REGEX "\\.[a-z]+$")
list(PREPEND PYDFLASH_EXT_FOLDERS "${PYDFLASH_EXT}")

# --- Our hooks and kernels ----------------------------------------------------------------------------------------
if(PYDFLASH_CUDA_ENABLED)
  set(CUDA_SOURCE "${GGML_SOURCE}/src/ggml-cuda/ggml-cuda.cu")
  set(CUDA_HOOKED "${CMAKE_CURRENT_BINARY_DIR}/hooked/ggml-cuda.cu")
  file(GLOB HOOKS CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/hooks/*.hook")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/apply_hooks.py" "${CUDA_SOURCE}" "${CUDA_HOOKED}" ${HOOKS}
    COMMAND_ERROR_IS_FATAL ANY)
  get_target_property(CUDA_SOURCES ggml-cuda SOURCES)
  list(FILTER CUDA_SOURCES EXCLUDE REGEX "/ggml-cuda\\.cu$")
  set_property(TARGET ggml-cuda PROPERTY SOURCES "${CUDA_SOURCES}")
  file(GLOB OUR_CUDA CONFIGURE_DEPENDS "${PYDFLASH_EXT}/*.cu" "${PYDFLASH_EXT}/*/*.cu")
  target_sources(ggml-cuda PRIVATE "${CUDA_HOOKED}" ${OUR_CUDA} "${PYDFLASH_EXT}/node.c")
  set_source_files_properties("${CUDA_HOOKED}" ${OUR_CUDA} "${PYDFLASH_EXT}/node.c"
    TARGET_DIRECTORY ggml-cuda PROPERTIES
    INCLUDE_DIRECTORIES "${PYDFLASH_EXT_FOLDERS};${GGML_SOURCE}/src;${GGML_SOURCE}/src/ggml-cuda")
  get_target_property(CUDA_ARCHITECTURES ggml-cuda CUDA_ARCHITECTURES)
  set(PYDFLASH_CUDA_TARGETS ggml-cuda)
  if(PYDFLASH_CUDA_KERNELS STREQUAL "needed")
    include("${CMAKE_CURRENT_LIST_DIR}/needed_kernels.cmake")
  endif()
endif()

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/ggml.toml" GGML_PIN REGEX "^ggml ")
string(REGEX REPLACE ".*\"(.*)\"" "\\1" GGML_PIN "${GGML_PIN}")
set(PYDFLASH_BUILD_INFO "cuda=${PYDFLASH_CUDA_ENABLED}|why=${PYDFLASH_CUDA_WHY}|nvcc=${CUDAToolkit_VERSION}|architectures=${CUDA_ARCHITECTURES}|kernels=${PYDFLASH_CUDA_KERNELS}|fa_quants=${GGML_CUDA_FA_QUANTS}|native=${GGML_NATIVE}|ggml=${GGML_PIN}")
string(REPLACE ";" "," PYDFLASH_BUILD_INFO "${PYDFLASH_BUILD_INFO}")

# Leaves out the kernels of ggml's CUDA back end that no graph of ours can reach: 70 of 160 objects, and more than half of
# the time of a build. PYDFLASH_CUDA_KERNELS=all builds everything.
#
# Two nodes of ggml's have most of the kernels, products (MUL_MAT) and attention (FLASH_ATTN_EXT). Our graphs contain
# both only in steps of more than PYDFLASH_EXACT_ROWS = 16 rows, because narrower steps take the nodes of ggml_ext/, and
# have no MUL_MAT_ID. What ggml then chooses, on every GPU with tensor cores (compute capability 7.0 and above):
#
# - Products (ggml_cuda_mul_mat): mmvf and mmvq take at most 8 columns and mmf 16, so a quantised weight goes to mmq or,
#   on Volta, to cuBLAS, and any other to cuBLAS. One exception: f32 weights of a single row went to mmvf and now go to
#   cuBLAS. Fused products (ggml_cuda_try_fuse) have one column. mmq is built for the types that ggml_ext/linear takes.
# - Attention (ggml_cuda_get_best_fattn_kernel): the vector kernel takes at most 2 rows, and the tile kernel GPUs without
#   tensor cores, 16 columns at most on Volta, or heads of 40 and 72. The rest is mma, in tiles of 64 columns, ncols1
#   rows by ncols2 heads that share a K. ncols2 is 1, 2, 4 or 8 by the number of those heads, and 1 when the slots are no
#   multiple of 256. More than 16 rows reach 64 columns for every ncols2 but 1, which takes 32 columns up to 32 rows.
# - On Turing, and wherever the code for compute capability 7.5 is the best there is, all tiles have 32 columns.
#
# What a graph contains is not only argued but checked: supports_op refuses any other node (left_out.cpp), by
# Graph.finish with its name and shape. All K and V of prefill attention are converted to f16 first, whatever their type.

set(MMQ_TYPES q4_0 q8_0 q4_k q5_k q6_k)
set(MMA_TILES 64-ncols2_1 32-ncols2_1 32-ncols2_2 16-ncols2_4 8-ncols2_8)

target_compile_definitions(ggml-cuda PRIVATE PYDFLASH_CUDA_NEEDED)
if(CUDA_ARCHITECTURES MATCHES "75|all|native")
  list(APPEND MMA_TILES 16-ncols2_2 8-ncols2_4 4-ncols2_8)
  target_compile_definitions(ggml-cuda PRIVATE PYDFLASH_CUDA_TURING)
endif()

list(TRANSFORM MMQ_TYPES PREPEND "mmq-instance-")
list(TRANSFORM MMA_TILES PREPEND "fattn-mma-f16-instance-ncols1_")
list(JOIN MMQ_TYPES "|" KEPT)
list(JOIN MMA_TILES "|" KEPT_TILES)
get_target_property(CUDA_SOURCES ggml-cuda SOURCES)
set(CUDA_KEPT ${CUDA_SOURCES})
list(FILTER CUDA_KEPT INCLUDE REGEX "/template-instances/(${KEPT}|${KEPT_TILES})\\.cu$")
list(FILTER CUDA_SOURCES EXCLUDE REGEX "/template-instances/|/(fattn-tile|mmf|mmvf|mmvq)\\.cu$")
set_property(TARGET ggml-cuda PROPERTY SOURCES ${CUDA_SOURCES} ${CUDA_KEPT})

# Last, so that a kernel that is built comes before a body of the same name.
set(LEFT_OUT "${CMAKE_CURRENT_LIST_DIR}/left_out.cpp")
target_sources(ggml-cuda PRIVATE "${LEFT_OUT}")
set_source_files_properties("${LEFT_OUT}" TARGET_DIRECTORY ggml-cuda PROPERTIES INCLUDE_DIRECTORIES "${PYDFLASH_EXT}")

set(LEFT_OUT_CHECKED "${CMAKE_CURRENT_BINARY_DIR}/left_out.checked")
add_custom_command(OUTPUT "${LEFT_OUT_CHECKED}"
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/check_left_out.py" "${CMAKE_NM}"
          "$<TARGET_OBJECTS:ggml-cuda>"
  COMMAND "${CMAKE_COMMAND}" -E touch "${LEFT_OUT_CHECKED}"
  DEPENDS ggml-cuda "${CMAKE_CURRENT_LIST_DIR}/check_left_out.py"
  COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(left_out_checked DEPENDS "${LEFT_OUT_CHECKED}")
list(APPEND PYDFLASH_CUDA_TARGETS left_out_checked)

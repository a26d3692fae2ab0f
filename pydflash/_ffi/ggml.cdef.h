/* What Python calls: ggml, the ops of ggml_ext/ and the shim in ggml.csrc.c. Enumerations are plain int here. */

struct ggml_context;
struct ggml_cgraph;
typedef struct ggml_backend * ggml_backend_t;
typedef struct ggml_backend_buffer * ggml_backend_buffer_t;
typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
typedef struct ggml_backend_device * ggml_backend_dev_t;
typedef struct ggml_gallocr * ggml_gallocr_t;

struct ggml_tensor {
    int64_t ne[4];
    size_t nb[4];
    void * data;
    ggml_backend_buffer_t buffer;
    char name[...];
    ...;
};

struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };

/* contexts, tensors, graphs */
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
size_t ggml_tensor_overhead(void);
size_t ggml_used_mem(const struct ggml_context * ctx);
size_t ggml_graph_overhead_custom(size_t size, bool grads);
struct ggml_tensor * ggml_new_tensor(struct ggml_context * ctx, int type, int n_dims, const int64_t * ne);
void ggml_set_input(struct ggml_tensor * tensor);
void ggml_set_output(struct ggml_tensor * tensor);
struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context * ctx, size_t size, bool grads);
void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
int ggml_graph_n_nodes(struct ggml_cgraph * cgraph);
struct ggml_tensor * ggml_graph_node(struct ggml_cgraph * cgraph, int i);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
size_t ggml_type_size(int type);
int64_t ggml_blck_size(int type);
const char * ggml_op_desc(const struct ggml_tensor * t);

/* operations */
struct ggml_tensor * ggml_add(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_mul(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_silu(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_sigmoid(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_swiglu_split(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_rms_norm(struct ggml_context * ctx, struct ggml_tensor * a, float eps);
struct ggml_tensor * ggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_get_rows(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_set_rows(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b, struct ggml_tensor * c);
struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
    struct ggml_tensor * mask, float scale, float max_bias, float logit_softcap);
bool ggml_prec_set_acc(struct ggml_tensor * a, int prec);
struct ggml_tensor * ggml_cont(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_cpy(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_permute(struct ggml_context * ctx, struct ggml_tensor * a, int axis0, int axis1, int axis2, int axis3);
struct ggml_tensor * ggml_reshape_4d(struct ggml_context * ctx, struct ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
struct ggml_tensor * ggml_view_4d(struct ggml_context * ctx, struct ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
    size_t nb1, size_t nb2, size_t nb3, size_t offset);
bool ggml_is_contiguous(const struct ggml_tensor * tensor);

/* back ends, buffers, allocation */
void ggml_backend_free(ggml_backend_t backend);
void ggml_backend_synchronize(ggml_backend_t backend);
ggml_backend_dev_t ggml_backend_get_device(ggml_backend_t backend);
ggml_backend_buffer_type_t ggml_backend_get_default_buffer_type(ggml_backend_t backend);
bool ggml_backend_supports_op(ggml_backend_t backend, const struct ggml_tensor * op);
void ggml_backend_tensor_set_async(ggml_backend_t backend, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_memset(struct ggml_tensor * tensor, uint8_t value, size_t offset, size_t size);
void ggml_backend_tensor_get_async(ggml_backend_t backend, const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total);
const char * ggml_backend_dev_description(ggml_backend_dev_t device);
ggml_backend_buffer_type_t ggml_backend_dev_host_buffer_type(ggml_backend_dev_t device);
ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors(struct ggml_context * ctx, ggml_backend_t backend);
size_t ggml_backend_alloc_ctx_tensors_from_buft_size(struct ggml_context * ctx, ggml_backend_buffer_type_t buft);
ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size);
void ggml_backend_buffer_free(ggml_backend_buffer_t buffer);
void * ggml_backend_buffer_get_base(ggml_backend_buffer_t buffer);
size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer);
void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value);
void ggml_backend_buffer_set_usage(ggml_backend_buffer_t buffer, int usage);
int ggml_backend_tensor_alloc(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor, void * addr);
ggml_gallocr_t ggml_gallocr_new(ggml_backend_buffer_type_t buft);
void ggml_gallocr_free(ggml_gallocr_t galloc);
void ggml_gallocr_reserve_n_size(ggml_gallocr_t galloc, struct ggml_cgraph * graph, const int * node_buffer_ids,
    const int * leaf_buffer_ids, size_t * sizes);
bool ggml_gallocr_reserve(ggml_gallocr_t galloc, struct ggml_cgraph * graph);
bool ggml_gallocr_alloc_graph(ggml_gallocr_t galloc, struct ggml_cgraph * graph);
size_t ggml_gallocr_get_buffer_size(ggml_gallocr_t galloc, int buffer_id);

/* the CPU back end */
struct ggml_threadpool;
ggml_backend_t ggml_backend_cpu_init(void);
ggml_backend_buffer_t ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
void ggml_backend_cpu_set_n_threads(ggml_backend_t backend, int n_threads);
void ggml_backend_cpu_set_threadpool(ggml_backend_t backend, struct ggml_threadpool * threadpool);
void ggml_threadpool_free(struct ggml_threadpool * threadpool);

/* our ops (ggml_ext/ext.h); generate.py adds PYDFLASH_OP_<ID> for each row of ops.def */
struct pydflash_scratch;
struct pydflash_scratch * pydflash_scratch_new(int threads);
void pydflash_scratch_free(struct pydflash_scratch * scratch);
size_t pydflash_graph_scratch_size(struct ggml_cgraph * cgraph);
bool pydflash_graph_set_scratch(struct ggml_cgraph * cgraph, struct pydflash_scratch * scratch);
struct pydflash_op { const char * name; ...; };
const struct pydflash_op * pydflash_node_op(const struct ggml_tensor * node);
int ggml_n_dims(const struct ggml_tensor * tensor);
struct ggml_tensor * pydflash_op_new(struct ggml_context * ctx, int id, int type, const int64_t * ne, struct ggml_tensor ** src, int n_src,
    const int32_t * params, struct ggml_tensor * inplace);

/* the shim (ggml.csrc.c) */
const char * pydflash_build_info(void);
const char * pydflash_cuda_load(const char * path);
bool pydflash_cuda_forked(void);
int pydflash_cuda_device_count(void);
ggml_backend_t pydflash_cuda_init(int device);
int64_t pydflash_cuda_fused_runs(int kind);
struct ggml_threadpool * pydflash_threadpool_new(int n_threads);
int pydflash_threads_try(int count, size_t stack, size_t left);
bool pydflash_can_allocate(size_t size);
int64_t pydflash_stack_left(void);
size_t pydflash_graph_work_size(struct ggml_cgraph * cgraph, int n_threads);
size_t pydflash_context_operands(const struct ggml_context * ctx);
void pydflash_graph_set_uid(struct ggml_cgraph * cgraph);
struct pydflash_copy { struct ggml_tensor * tensor; void * data; size_t size; };
int pydflash_step(ggml_backend_t backend, struct ggml_cgraph * graph, int64_t stack, const struct pydflash_copy * inputs,
    int n_inputs, const struct pydflash_copy * results, int n_results);
void pydflash_log_start(void);
int pydflash_log_last(char * line, int size);

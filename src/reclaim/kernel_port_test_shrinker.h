/* A kernel-style shrinker in C, compiled by a C compiler: see kernel_port_test_shrinker.c. */
#ifdef __cplusplus
extern "C" {
#endif
int port_cache_init(const char *name);
void port_cache_add(unsigned long n);
unsigned long port_cache_size(void);
void port_cache_exit(void);
int port_cache_id(void);
void port_cache_stop(int on);
#ifdef __cplusplus
}
#endif

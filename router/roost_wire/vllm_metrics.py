"""Metric names of vLLM (0.33), which our engine exports and our router reads.

Counters carry `_total` on the wire; prometheus_client adds it, so the names here are without.
Source: vLLM's v1/metrics/loggers.py; the Gateway API inference extension asks for the same.
"""

NUM_REQUESTS_RUNNING = "vllm:num_requests_running"
NUM_REQUESTS_WAITING = "vllm:num_requests_waiting"
KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"
#: Info gauge (value 1) whose labels hold `block_size` and `num_gpu_blocks`.
CACHE_CONFIG_INFO = "vllm:cache_config_info"
PREFIX_CACHE_QUERIES = "vllm:prefix_cache_queries"
PREFIX_CACHE_HITS = "vllm:prefix_cache_hits"
PROMPT_TOKENS = "vllm:prompt_tokens"
GENERATION_TOKENS = "vllm:generation_tokens"
NUM_PREEMPTIONS = "vllm:num_preemptions"
REQUEST_SUCCESS = "vllm:request_success"
TIME_TO_FIRST_TOKEN = "vllm:time_to_first_token_seconds"  # noqa: S105 - a metric, not a secret
INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds"  # noqa: S105
E2E_LATENCY = "vllm:e2e_request_latency_seconds"

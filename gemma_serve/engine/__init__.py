"""Running a model with vLLM; knows nothing of HTTP, and is the only package that imports vllm."""

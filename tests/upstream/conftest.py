"""Markers of the upstream suites, which sort their tests for runners of their own."""

TIMM = ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout")
TRANSFORMERS = (
    *(
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
        "generate",
    ),
    *("is_pipeline_test", "is_tensor_parallel_test", "is_training_test", "is_expert_parallel_test", "is_fsdp_test"),
    *("is_agent_test", "is_staging_test", "order", "asyncio", "generate", "torch_export_test"),
)


def pytest_configure(config):
    for name in (*TIMM, *TRANSFORMERS):
        config.addinivalue_line("markers", f"{name}: of an upstream suite")

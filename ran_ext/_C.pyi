from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None
    cpu_kernels: str

def build_info() -> BuildInfo: ...

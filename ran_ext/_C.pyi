from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None

def build_info() -> BuildInfo: ...

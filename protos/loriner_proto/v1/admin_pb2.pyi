from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("state", "num_restarts", "model", "base_digest", "version", "max_model_len", "num_running", "num_waiting", "num_blocks", "num_free_blocks", "pool_bytes", "pool_used_bytes", "host_bytes", "host_used_bytes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    state: str
    num_restarts: int
    model: str
    base_digest: str
    version: str
    max_model_len: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    pool_bytes: int
    pool_used_bytes: int
    host_bytes: int
    host_used_bytes: int
    def __init__(self, state: _Optional[str] = ..., num_restarts: _Optional[int] = ..., model: _Optional[str] = ..., base_digest: _Optional[str] = ..., version: _Optional[str] = ..., max_model_len: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., pool_bytes: _Optional[int] = ..., pool_used_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., host_used_bytes: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_open",)
    NUM_OPEN_FIELD_NUMBER: _ClassVar[int]
    num_open: int
    def __init__(self, num_open: _Optional[int] = ...) -> None: ...

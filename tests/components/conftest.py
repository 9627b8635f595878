import onnx
import pytest
from recovering import Net


@pytest.fixture
def wide_net() -> onnx.ModelProto:
    """Return a net wide enough to lose channels and for ranks of 16: (N,1,6,6) -> (N,3)."""
    net = Net(0, channels=1)
    net.conv(32)
    net.relu()
    net.conv(48)
    net.relu()
    return net.head(3)

"""Downloading published weights, over a torch.hub whose server is a folder."""

import hashlib
import io
import re
import sys
import urllib.error
from email.message import Message

import pytest
import torch
from torch import Tensor

import convnext_fast
from convnext_fast.checkpoint import CheckpointError, convert_state_dict
from convnext_fast.pretrained import PRETRAINED, load_pretrained, pretrained_arguments

from .networks import images, ours, randomise, timm, torchvision

TINY = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}  # in place of the builders' own sizes
URL = PRETRAINED["convnext_tiny", False][0]


class Server:
    """Answers urlopen with the bytes in ``files``; an exception in their place is raised, and unknown names are 404."""

    def __init__(self):
        self.files: dict[str, bytes | Exception] = {}
        self.requests: list[str] = []

    def urlopen(self, request):
        url = request.full_url
        self.requests.append(url)
        answer = self.files.get(url, urllib.error.HTTPError(url, 404, "Not Found", Message(), None))
        if isinstance(answer, Exception):
            raise answer
        reply = io.BytesIO(answer)
        reply.info = Message
        return reply


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr(torch.hub, "urlopen", server.urlopen)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub" / "checkpoints"


def file_of(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def published(classes: int = 1000, seed: int = 0, **kwargs) -> dict[str, Tensor]:
    return randomise(ours(num_classes=classes, **{**TINY, **kwargs}), seed).state_dict()


def assert_holds(model, state, but=()) -> None:
    own = model.state_dict()
    assert own
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name]) != (name in but), name


def test_downloads_once(server, cache):
    state = published()
    server.files[URL] = file_of({"model": state})
    for _ in range(2):
        assert_holds(convnext_fast.convnext_tiny(pretrained=True, **TINY), state)
    assert server.requests == [URL]
    assert [path.name for path in cache.iterdir()] == ["convnext_tiny_1k_224_ema.pth"]


def test_22k_has_its_own_file_and_classes(server):
    state = published(classes=21841)
    server.files[PRETRAINED["convnext_xlarge", True][0]] = file_of({"model": state})
    model = convnext_fast.convnext_xlarge(pretrained=True, in_22k=True, **TINY)
    assert model.head.out_features == 21841
    assert_holds(model, state)


def test_v2_and_isotropic(server):
    state = published(v2=True)
    server.files[PRETRAINED["convnextv2_nano", True][0]] = file_of({"model": state})
    assert_holds(convnext_fast.convnextv2_nano(pretrained=True, in_22k=True, **TINY), state)
    small = {"depth": 2, "dim": 8}
    state = randomise(convnext_fast.ConvNeXtIsotropic(**small)).state_dict()
    server.files[PRETRAINED["convnext_isotropic_base", False][0]] = file_of({"model": state})
    assert_holds(convnext_fast.convnext_isotropic_base(pretrained=True, **small), state)


def with_hash(content: bytes) -> str:
    return f"https://example.org/convnext_atto_d2-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_timm_files_in_their_dialect_with_their_hash(server, cache, monkeypatch):
    peer = randomise(timm(conv_mlp=True, num_classes=1000, **TINY))
    content = file_of(peer.state_dict())
    url = with_hash(content)
    monkeypatch.setitem(PRETRAINED, ("convnext_atto", False), (url, 1000))
    server.files[url] = content[:-1] + b"x"
    with pytest.raises(RuntimeError, match=r"cannot download .*invalid hash value"):
        convnext_fast.convnext_atto(pretrained=True, **TINY)
    assert list(cache.iterdir()) == []
    server.files[url] = content
    model = convnext_fast.convnext_atto(pretrained=True, **TINY)
    assert_holds(model, convert_state_dict(peer.state_dict(), to="facebook"))
    with torch.no_grad():
        assert torch.allclose(model.eval()(images()), peer(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("name resolution failed"),
        urllib.error.HTTPError(URL, 503, "Service Unavailable", Message(), None),
        TimeoutError("timed out"),
        ConnectionResetError("reset by peer"),
    ],
)
def test_no_network(server, cache, failure):
    server.files[URL] = failure
    with pytest.raises(RuntimeError) as caught:
        convnext_fast.convnext_tiny(pretrained=True, **TINY)
    message = str(caught.value)
    assert isinstance(caught.value, OSError), "as a failing download is one"
    assert URL in message
    assert str(failure) in message
    assert 'pretrained="/path/to/file"' in message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "web page", "empty", "nan"])
def test_corrupt_download_is_not_kept(server, cache, damage):
    state = published()
    good = file_of({"model": state})
    bad = {"truncated": good[: len(good) // 2], "web page": b"<html>captive portal</html>", "empty": b""}
    bad["nan"] = file_of({"model": {**state, "norm.bias": torch.full_like(state["norm.bias"], float("nan"))}})
    server.files[URL] = bad[damage]
    with pytest.raises(RuntimeError, match=re.escape(f"{URL} gave a file that cannot be used: ")):
        convnext_fast.convnext_tiny(pretrained=True, **TINY)
    assert list(cache.iterdir()) == []
    server.files[URL] = good
    assert_holds(convnext_fast.convnext_tiny(pretrained=True, **TINY), state)


def test_corrupt_cache_is_downloaded_again(server, cache):
    state = published()
    server.files[URL] = file_of({"model": state})
    cache.mkdir(parents=True)
    (cache / "convnext_tiny_1k_224_ema.pth").write_bytes(b"half a fi")
    assert_holds(convnext_fast.convnext_tiny(pretrained=True, **TINY), state)
    assert server.requests == [URL]


def test_hostile_download_does_not_run(server, cache, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    server.files[URL] = file_of({"model": published(), "args": Payload()})
    with pytest.raises(RuntimeError, match="holds Python objects other than tensors"):
        convnext_fast.convnext_tiny(pretrained=True, **TINY)
    assert not (tmp_path / "ran").exists()
    assert list(cache.iterdir()) == []


def test_file_of_another_network(server):
    server.files[URL] = file_of({"model": published()})
    with pytest.raises(CheckpointError, match=re.escape(URL)) as caught:
        convnext_fast.convnext_tiny(pretrained=True, depths=(1, 2, 1, 1), dims=TINY["dims"])
    assert re.search(r"missing +stages\.1\.1\.gamma", str(caught.value))


def test_layer_scale_of_a_file_is_named(server):
    """The published large isotropic network has layer scale, and the builder's default, as the original's, has none."""
    state = randomise(convnext_fast.ConvNeXtIsotropic(depth=2, dim=8, layer_scale_init_value=1e-6)).state_dict()
    server.files[PRETRAINED["convnext_isotropic_large", False][0]] = file_of({"model": state})
    with pytest.raises(CheckpointError, match="layer_scale_init_value=1e-6"):
        convnext_fast.convnext_isotropic_large(pretrained=True, depth=2, dim=8, layer_scale_init_value=0.0)
    model = convnext_fast.convnext_isotropic_large(pretrained=True, depth=2, dim=8, layer_scale_init_value=1e-6)
    assert_holds(model, state)


def test_other_number_of_classes(server):
    state = published()
    server.files[URL] = file_of({"model": state})
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="has 1000 classes and the model 5: everything is loaded but the head"):
        model = convnext_fast.convnext_tiny(pretrained=True, num_classes=5, **TINY)
    assert_holds(model, {**state, "head.weight": torch.zeros(()), "head.bias": model.head.bias}, but=["head.weight"])
    assert 0 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()


@pytest.mark.filterwarnings("error")
def test_without_head(server):
    state = published()
    server.files[URL] = file_of({"model": state})
    assert_holds(convnext_fast.convnext_tiny(pretrained=True, num_classes=0, **TINY), state)
    maps = convnext_fast.convnext_tiny(pretrained=True, features_only=True, out_indices=(1, 3), **TINY)
    assert_holds(maps, state)
    assert "head.weight" not in maps.state_dict()


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 9])
def test_other_channels(server, channels):
    state = published()
    server.files[URL] = file_of({"model": state})
    name = "downsample_layers.0.0.weight"
    model = convnext_fast.convnext_tiny(pretrained=True, in_chans=channels, **TINY).eval()
    stem, rgb = model.state_dict()[name], state[name]
    assert stem.shape[1] == channels
    if channels == 1:
        assert torch.equal(stem[:, 0], rgb[:, 0] + rgb[:, 1] + rgb[:, 2])
    else:
        for q in range(channels):
            assert torch.allclose(stem[:, q], rgb[:, q % 3] * 3 / channels), q
    if channels in (1, 6, 9):  # a grey image gives the same logits
        plain = convnext_fast.convnext_tiny(pretrained=True, **TINY).eval()
        grey = images(channels=1)
        with torch.no_grad():
            got, expected = (m(grey.expand(-1, m.in_chans, -1, -1)) for m in (model, plain))
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_grey_stem_gives_one_for_other_channels(tmp_path, channels):
    grey = randomise(ours(in_chans=1, **TINY)).eval()
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    kwargs = {"num_classes": grey.num_classes, "in_chans": channels, **TINY}
    model = convnext_fast.convnext_tiny(pretrained=tmp_path / "grey.pth", **kwargs).eval()
    x = images(channels=1)
    with torch.no_grad():
        assert torch.allclose(model(x.expand(-1, channels, -1, -1)), grey(x), rtol=1e-4, atol=1e-4)


def test_a_stem_for_unknown_channels_is_not_guessed(tmp_path):
    torch.save(randomise(ours(in_chans=5, **TINY)).state_dict(), tmp_path / "five.pth")
    with pytest.raises(CheckpointError, match=r"shape +downsample_layers\.0\.0\.weight"):
        convnext_fast.convnext_tiny(pretrained=tmp_path / "five.pth", num_classes=7, **TINY)


def test_other_channels_isotropic(tmp_path):
    state = randomise(convnext_fast.ConvNeXtIsotropic(depth=1, dim=8)).state_dict()
    torch.save(state, tmp_path / "iso.pth")
    model = convnext_fast.convnext_isotropic_small(pretrained=tmp_path / "iso.pth", depth=1, dim=8, in_chans=1)
    assert torch.allclose(model.stem.weight, state["stem.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize("as_text", [True, False])
def test_path_of_any_dialect(server, tmp_path, as_text):
    peer = randomise(torchvision())
    file = tmp_path / "mine.pth"
    torch.save({"state_dict": peer.state_dict()}, file)
    model = ours().eval()
    load_pretrained(model, "convnext_tiny", str(file) if as_text else file, in_22k=False)
    with torch.no_grad():
        assert torch.allclose(model(images()), peer(images()), rtol=1e-4, atol=1e-4)
    assert server.requests == []
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        convnext_fast.convnext_tiny(pretrained=str(tmp_path / "absent.pth"), **TINY)


# The table


@pytest.mark.parametrize(
    "name, in_22k, message",
    [
        ("convnext_xlarge", False, r"in_22k=False; in_22k=True has"),
        ("convnext_atto", True, r"in_22k=True; in_22k=False has"),
        ("convnext_isotropic_small", True, r"in_22k=True; in_22k=False has"),
        ("convnextv2_small", False, r"weights is known for convnextv2_small; it is for: convnext_atto, .*v2_huge"),
        ("replknet_31b", False, r"no address of published weights is known for replknet_31b"),
    ],
)
def test_unpublished(server, name, in_22k, message):
    with pytest.raises(ValueError, match=message):
        pretrained_arguments(name, in_22k)
    with pytest.raises(ValueError, match=message):
        load_pretrained(ours(), name, True, in_22k)
    with pytest.raises(ValueError, match=message):
        convnext_fast.create_model(name, pretrained=True, in_22k=in_22k)
    assert server.requests == []


def test_table_covers_the_zoo():
    names = {name for name, _ in PRETRAINED}
    unpublished = {"convnextv2_small", "replknet_31b", "replknet_31l", "replknet_xl"}
    assert set(convnext_fast.list_models()) - names == unpublished
    assert names <= set(convnext_fast.list_models())
    assert len({url for url, _ in PRETRAINED.values()}) == len(PRETRAINED) == 34
    assert {classes for _, classes in PRETRAINED.values()} == {1000, 21841}


@pytest.mark.parametrize("name, sizes, stem", [
    ("convmixer_768_32", {"dim": 8, "depth": 2}, "stem.0.weight"),
    ("dwnet_tiny", {"embed_dim": 4, "depths": (1, 1)}, "patch_embed.proj.weight"),
])  # fmt: skip
def test_other_networks_with_other_classes_and_channels(server, name, sizes, stem):
    """Batch norms bring running statistics and integers; heads and stems change as those of ConvNeXts do."""
    published = randomise(convnext_fast.create_model(name, **sizes))
    url = PRETRAINED[name, False][0]
    server.files[url] = file_of({"state_dict": published.state_dict(), "epoch": 150})
    model = convnext_fast.create_model(name, pretrained=True, **sizes)
    x = images(2, 56, 56)
    assert torch.equal(model.eval()(x), published.eval()(x))
    with pytest.warns(UserWarning, match="1000 classes and the model 3: everything is loaded but the head"):
        grey = convnext_fast.create_model(name, pretrained=True, num_classes=3, in_chans=1, **sizes)
    ours, theirs = grey.state_dict(), published.state_dict()
    torch.testing.assert_close(ours[stem], theirs[stem].sum(1, keepdim=True))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != stem and not key.startswith("head."))
    assert server.requests == [url]


def test_addresses_are_those_that_timm_lists():
    """A second source for all but the isotropic networks, which timm does not have."""
    pytest.importorskip("timm")
    listed = {}
    for config in sys.modules["timm.models.convnext"].default_cfgs.values():
        listed.update({tag.url: tag.num_classes for tag in config.cfgs.values() if tag.url})
    for (name, _), (url, classes) in PRETRAINED.items():
        if name.startswith("convnext") and "isotropic" not in name:
            assert listed[url] == classes, url

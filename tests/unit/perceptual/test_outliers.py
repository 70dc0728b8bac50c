import pytest
import torch

from lpl.perceptual import distance
from lpl.perceptual.distance import HALO, inlier_range
from lpl.perceptual.strips import channel_moments
from lpl.perceptual.textbook import inlier_mask as textbook_mask


def standard_deviation(y):
    n = y.shape[2] * y.shape[3]
    return (channel_moments(y)[1] / max(n - 1, 1)).sqrt()


def inlier_mask(y, stride):
    return distance.inlier_mask(y, *inlier_range(y, standard_deviation(y)), stride).to(y.dtype)


def masked_block(height, width, stride, value=100.0):
    """Rows, columns and number of the values masked for a block of outliers in a 32 x 32 map of zeros."""
    y = torch.zeros(1, 1, 32, 32)
    y[..., 10 : 10 + height, 12 : 12 + width] = value
    rows, columns = torch.nonzero(inlier_mask(y, stride)[0, 0] == 0, as_tuple=True)
    if not len(rows):
        return None
    return (rows.min().item(), rows.max().item()), (columns.min().item(), columns.max().item()), len(rows)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 2), (2, 6), (6, 1)])
def test_at_stride_1_holes_of_up_to_2_values_close(height, width):
    assert masked_block(height, width, stride=1) is None


@pytest.mark.parametrize("value", [100.0, -100.0])
def test_at_stride_1_larger_holes_grow_a_margin_of_one(value):
    assert masked_block(3, 3, 1, value) == ((9, 13), (11, 15), 25)
    assert masked_block(3, 5, 1, value) == ((9, 13), (11, 17), 35)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (3, 3)])
def test_at_stride_2_nothing_closes_and_all_grow(height, width):
    expected = ((9, 10 + height), (11, 12 + width), (height + 2) * (width + 2))
    assert masked_block(height, width, stride=2) == expected


def test_outliers_at_the_border_grow_inwards_only():
    y = torch.zeros(1, 1, 32, 32)
    y[..., 0, 0] = 100
    assert (inlier_mask(y, 2) == 0).nonzero()[:, 2:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("value", "count", "is_masked"), [(10, 1, True), (10, 2, True), (10, 3, False), (-10, 1, True), (-10, 2, False)]
)
def test_quantiles_of_100_values(value, count, is_masked):
    """Bounds start at the 2nd and the 98th smallest: one low or two high spikes lie beyond them, one more does not."""
    y = torch.zeros(100)
    y[[11, 55, 88][:count]] = value
    assert (inlier_mask(y.view(1, 1, 10, 10), 2) == 0).any() == is_masked


def test_margin_is_two_standard_deviations():
    """0..99 plus a top value v: masked where v >= 97 + 2 std. Std of the map is about 29 to 34 here."""
    y = torch.arange(100.0).view(1, 1, 10, 10)
    for top, is_masked in ((150.0, False), (175.0, True)):
        y[..., 5, 5], y[..., 9, 9] = top, 55.0
        assert (97 + 2 * y.std().item() < top) == is_masked
        assert (inlier_mask(y, 2)[0, 0, 5, 5] == 0) == is_masked


def test_samples_and_channels_are_judged_alone():
    y = torch.arange(256.0).view(16, 16).expand(2, 2, 16, 16) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    y[0, 0, 8, 8] = 1000.0
    assert (inlier_mask(y, 2) == 0).sum((2, 3)).tolist() == [[9, 0], [0, 0]]


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 4), (4, 4), (7, 7), (10, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_of_few_values(size, stride):
    """Under 50 values, 2 % of them is less than one: fails where the 0th order statistic is asked for."""
    y = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    y[0, 0, 0, 0] = 50
    mask = inlier_mask(y, stride)
    assert mask.shape == y.shape
    assert ((mask == 0) | (mask == 1)).all()
    if y[0, 0].numel() > 1:
        assert torch.equal(mask, textbook_mask(y, stride))


def test_order_statistics_of_16_values():
    """floor(0.98 * 16) = 15: one spike of 16 is above the 15th smallest and more than 2 std away."""
    y = torch.zeros(1, 1, 4, 4)
    y[..., 0, 0] = 8
    assert (inlier_mask(y, 2) == 0).sum() == 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_textbook_on_heavy_tails(stride, dtype):
    y = torch.randn(2, 8, 24, 40, generator=torch.Generator().manual_seed(1), dtype=dtype) ** 5
    y[:, :, 3:7, 20:24] = torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1)
    mask = inlier_mask(y, stride)
    assert torch.equal(mask, textbook_mask(y, stride))
    assert 0 < (mask == 0).double().mean() < 0.5


def test_constant_map_is_masked_entirely():
    """No value lies strictly between bounds that are equal; the loss counts such a channel 0, see test_loss."""
    assert (inlier_mask(torch.full((1, 1, 8, 8), 3.0), 2) == 0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_with_their_halo_have_the_mask_of_the_whole_map(stride):
    y = torch.randn(2, 4, 40, 24, generator=torch.Generator().manual_seed(3)) ** 5
    y[:, :, 8:11, 3:7] = 1e4
    found = inlier_range(y, standard_deviation(y))
    whole = distance.inlier_mask(y, *found, stride)
    assert not whole.all()
    for first, last in ((0, 6), (6, 12), (12, 30), (38, 40)):
        low, high = max(0, first - HALO), min(40, last + HALO)
        rows = distance.inlier_mask(y[:, :, low:high], *found, stride)[:, :, first - low : last - low]
        assert torch.equal(rows, whole[:, :, first:last])


@pytest.mark.parametrize("shape", [(512, 512), (300, 400), (257, 1021)])
def test_sampled_order_statistics_differ_on_under_a_thousandth(shape):
    """Smooth maps with structure at every scale, larger than the sample, as feature maps are."""
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(1, 4, *shape)
    for size in (4, 16, 64, 256):
        coarse = torch.randn(1, 4, size, size, generator=generator)
        y += torch.nn.functional.interpolate(coarse, shape, mode="bilinear")
    y = y**3
    std = standard_deviation(y)
    sampled = distance.inlier_mask(y, *inlier_range(y, std), 1)
    exact = textbook_mask(y, 1).bool()
    assert not exact.all()
    assert (sampled != exact).double().mean() < 1e-3
    low, high = inlier_range(y, std)
    flat = y.flatten(2)
    n = flat.shape[-1]
    sampled_rank = (flat < (low + 2 * std)[..., 0]).double().mean(-1)
    assert ((sampled_rank - 0.02).abs() < 0.004).all(), n
    assert (low + 2 * std < high - 2 * std).all()


@pytest.mark.parametrize("n", [64, 4096, 4100])
@pytest.mark.parametrize("k", [1, 2, 80, 128])
@pytest.mark.parametrize("largest", [True, False])
def test_kth_value_is_exact(n, k, largest):
    """Where blocks are looked through and where not; with ties."""
    k = min(k, n)
    for values in (
        torch.randn(3, 2, n),
        torch.randint(0, 9, (3, 2, n)).float(),
        torch.arange(n).float().expand(3, 2, n),
    ):
        expected = values.sort(-1, descending=largest).values[..., k - 1]
        assert torch.equal(distance._kth(values, k, largest), expected)

"""The batches of an epoch: the same for any number of workers and loader processes, and after going on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIDE
from hypothesis import given
from hypothesis import strategies as st

from trainables.batches import Pieces, Share, epoch_order, grain, key_of, parts_of
from trainables.data import View, load_images
from trainables.objective import Objective
from trainables.settings import Recipe

VIEW = View((1, SIDE, SIDE), (0.4,), (0.25,), "bicubic", 1.0)
RANDOM = Recipe(batch_size=24, random_erasing=0.5, auto_augment="rand-m5-inc1", crop_scale=0.3)
MIXED = replace(RANDOM, mixup=0.8, cutmix=1.0, repeated_augmentation=3)


@pytest.fixture(scope="module")
def train(tiny_data):
    return load_images(tiny_data, "train", VIEW, 0, limit=96)


def batches(
    train, recipe: Recipe, world: int, *, epoch: int = 0, seed: int = 5, workers: int = 0
) -> list[torch.Tensor]:
    """Return the pixels of every batch of an epoch, put together from what each of the workers is given."""
    shares = [
        train.train_batches(recipe, seed, epoch, share=Share(rank, world), workers=workers) for rank in range(world)
    ]
    return [torch.cat([pixels for pixels, _ in pieces]) for pieces in zip(*shares, strict=True)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("recipe", [RANDOM, MIXED], ids=["random", "repeated"])
def test_any_number_of_workers_and_of_loader_processes_sees_the_same_batches_bit_for_bit(train, recipe):
    alone = batches(train, recipe, 1)
    for world in (2, 3, 5):
        torch.rand(world)
        assert equal(batches(train, recipe, world), alone)
    assert equal(batches(train, recipe, 1, workers=2), alone)
    assert not equal(batches(train, recipe, 1, epoch=1), alone)
    assert not equal(batches(train, recipe, 1, seed=6), alone)


def test_an_image_is_augmented_alike_wherever_in_an_epoch_it_stands_and_otherwise_in_another_epoch(train):
    def of_image(number: int, epoch: int, images) -> torch.Tensor:
        numbered = replace(images, labels=np.arange(len(images)))
        for pixels, labels in numbered.train_batches(replace(RANDOM, batch_size=8), 5, epoch):
            if number in labels.tolist():
                return pixels[labels.tolist().index(number)]
        raise AssertionError

    fewer = replace(train, pixels=train.pixels[:64], labels=train.labels[:64])
    assert torch.equal(of_image(3, 0, train), of_image(3, 0, fewer))
    assert not torch.equal(of_image(3, 0, train), of_image(3, 1, train))


@pytest.mark.parametrize(
    "recipe", [MIXED, replace(MIXED, cutmix=0.0), replace(MIXED, mixup=0.0, repeated_augmentation=1)]
)
def test_images_are_mixed_with_the_same_ones_by_the_same_amount_for_any_number_of_workers(train, recipe):
    objective = Objective(recipe, 3, None)

    def mixed(world: int) -> list[torch.Tensor]:
        found = []
        for rank in range(world):
            pixels, labels = next(train.train_batches(recipe, 5, 0, share=Share(rank, world)))
            torch.rand(rank), np.random.rand(rank)
            pixels, targets = objective.targets(pixels, labels, key_of(5, 0))
            found += [torch.cat([image.flatten(), target]) for image, target in zip(pixels, targets, strict=True)]
        return sorted(found, key=torch.Tensor.tolist)

    assert equal(mixed(2), mixed(1))
    assert equal(mixed(5), mixed(1))
    plain = next(train.train_batches(recipe, 5, 0))[0].flatten(1)
    changed = [not any(torch.equal(image[:-3], own) for own in plain) for image in mixed(1)]
    assert np.mean(changed) > 0.5


def test_mixed_images_keep_their_labels_with_them(train):
    """Each image is one value, told by its label: what is mixed of one must be mixed of the other."""
    labels = torch.arange(8)
    pixels = labels.float().view(8, 1, 1, 1).expand(8, 1, 4, 4).clone()
    images, targets = Objective(Recipe(mixup=1.0, label_smoothing=0.0), 8, None).targets(pixels, labels, 3)
    assert torch.allclose(images.mean((1, 2, 3)), targets @ torch.arange(8.0), atol=1e-5)
    assert all(set(row.nonzero().flatten().tolist()) in ({0, 1}, {2, 3}, {4, 5}, {6, 7}) for row in targets)


orders = st.tuples(st.integers(1, 200), st.integers(1, 64), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))


@given(orders)
def test_an_epoch_has_every_image_at_most_as_often_as_it_is_repeated(drawn):
    images, size, repeats, seed, epoch = drawn
    recipe = Recipe(batch_size=size, repeated_augmentation=repeats)
    order = epoch_order(images, recipe, seed, epoch)
    assert order.shape == (images // size, size, 2)
    flat = [tuple(row) for row in order.reshape(-1, 2).tolist()]
    assert len(set(flat)) == len(flat)
    assert all(0 <= image < images and 0 <= repeat < repeats for image, repeat in flat)
    assert len({image for image, _ in flat}) == -(-len(flat) // repeats)
    assert np.array_equal(order, epoch_order(images, recipe, seed, epoch))


@given(st.integers(1, 300), st.integers(1, 9), st.sampled_from([1, 2]))
def test_pieces_follow_each_other_and_differ_by_one_grain_at_most(grains, world, grain):
    size = grains * grain
    if grains < world:
        with pytest.raises(ValueError, match=f"a batch of {size} images cannot be shared by {world} workers"):
            Share(0, world).of(size, grain)
        return
    pieces = [range(size)[Share(rank, world).of(size, grain)] for rank in range(world)]
    assert [n for piece in pieces for n in piece] == list(range(size))
    assert {len(piece) % grain for piece in pieces} == {0}
    assert max(map(len, pieces)) - min(map(len, pieces)) <= grain


def test_an_odd_batch_has_no_pairs():
    with pytest.raises(ValueError, match="a batch of 7 images cannot be shared by 1 workers in pairs, as mixup"):
        Share().of(7, grain(Recipe(mixup=0.1)))


@pytest.mark.parametrize(
    ("recipe", "world", "most", "parts"),
    [
        (Recipe(batch_size=64), 1, 1, 1), (Recipe(batch_size=64), 4, 4, 1), (Recipe(batch_size=64), 2, 4, 2),
        (Recipe(batch_size=64), 1, 4, 4), (Recipe(batch_size=64), 3, 4, 2), (Recipe(batch_size=64), 4, 1, 1),
        (Recipe(batch_size=64, micro_batch=5), 1, 1, 13), (Recipe(batch_size=64, micro_batch=100), 1, 4, 1),
        (Recipe(batch_size=64, mixup=0.5), 1, 3, 3), (Recipe(batch_size=7, micro_batch=1), 2, 2, 3),
    ],
)  # fmt: skip
def test_a_worker_takes_no_more_at_once_than_with_the_most_workers(recipe, world, most, parts):
    assert parts_of(recipe, world, most) == parts


def test_what_a_loader_takes_is_this_workers_piece_of_every_batch():
    order = epoch_order(50, Recipe(batch_size=10), 1, 0)
    pieces = Pieces(order, slice(4, 7))
    assert len(pieces) == 5
    assert [row for piece in pieces for row in piece] == order[:, 4:7].reshape(-1, 2).tolist()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_keys_tell_their_parts_apart(first, second):
    assert (key_of(*first) == key_of(*second)) == (first == second)

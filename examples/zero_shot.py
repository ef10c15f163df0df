"""Zero-shot classification: the image tower of CLIP or SigLIP on vit's kernels, the text tower of transformers.

    python examples/zero_shot.py CLIP_FOLDER IMAGE "a photo of a cat" "a photo of a dog" ...

CLIP_FOLDER is what transformers' save_pretrained or a download of openai/clip-vit-base-patch32 left on the disk.
Without arguments a small CLIP with random weights is made, and the scores are compared with transformers' own.
Needs transformers.
"""

import importlib.util
import sys
import tempfile

import torch
import vit
from PIL import Image

if importlib.util.find_spec("transformers") is None:
    print("skipped: transformers is not installed")
    raise SystemExit


def texts_of(folder, texts):
    """Embeddings [texts, D] by transformers."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        texts, padding="max_length", return_tensors="pt"
    )
    with torch.inference_mode():
        found = model.get_text_features(**tokens)
    return getattr(found, "pooler_output", found), model.logit_scale.exp().item()  # transformers 5 returns a record


def shares(images, texts, scale):
    """Image embeddings [B, D] and text embeddings [texts, D] -> probabilities [B, texts]."""
    return (scale * torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T).softmax(-1)


def random_clip(folder):
    """A small CLIP in a folder, beside the scores that transformers gives to two images and three texts."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    images, words = torch.randn(2, 3, 32, 32), torch.randint(0, 48, (3, 8))
    words[:, -1] = 49
    with torch.inference_mode():
        theirs = model(input_ids=words, pixel_values=images)
    model.save_pretrained(folder)
    return images, theirs.text_embeds, model.logit_scale.exp().item(), theirs.logits_per_image.softmax(-1)


if len(sys.argv) > 3:
    folder, image, *texts = sys.argv[1:]
    model = vit.create(weights=folder, training=False)  # its head is CLIP's projection
    with torch.inference_mode():
        embedding = model(model.preprocess(Image.open(image))[None])
    for text, share in sorted(
        zip(texts, shares(embedding, *texts_of(folder, texts))[0], strict=True), key=lambda x: -x[1]
    ):
        print(f"{100 * share:6.2f} %  {text}")
else:
    with tempfile.TemporaryDirectory() as folder:
        images, texts, scale, theirs = random_clip(folder)
        model = vit.create(weights=folder, training=False)
    with torch.inference_mode():
        ours = shares(model(images), texts, scale)
    print(f"largest difference of the probabilities from transformers': {(ours - theirs).abs().max().item():.1e}")

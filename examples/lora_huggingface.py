"""LoRA by PEFT on an accelerated ConvNeXt of Hugging Face: which blocks step aside for it, and how they come back.

pip install peft transformers && python examples/lora_huggingface.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import ConvNextConfig, ConvNextForImageClassification

import convnext_fast

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = ConvNextConfig(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], layer_scale_init_value=1.0, num_labels=4)
model = ConvNextForImageClassification(config).to(device)  # .from_pretrained("facebook/convnext-tiny-224") in earnest
print("before LoRA\n", convnext_fast.accelerate(model), sep="")

# Adapters in the last two stages: a block whose linear layers PEFT replaced calls its children one after another, as
# without accelerate (its depthwise convolution stays on the kernels); all other blocks do not notice.
lora = LoraConfig(
    r=8, target_modules=r".*stages\.[23]\..*pwconv[12]", modules_to_save=["classifier"], init_lora_weights=False
)
tuned = get_peft_model(model, lora)
print("\nwith LoRA\n", convnext_fast.accelerate(tuned), sep="")  # swaps nothing anew, and tells how things are now
tuned.print_trainable_parameters()

images, labels = torch.randn(8, 3, 64, 64, device=device), torch.arange(8, device=device) % 4
optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
for _ in range(5):
    loss = tuned(pixel_values=images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("loss", loss.item())

tuned.eval()
with torch.inference_mode():
    expected = tuned(pixel_values=images).logits
    merged = tuned.merge_and_unload()  # Linear layers again: the blocks are back on the kernels by themselves
    print("\nmerged\n", convnext_fast.accelerate(merged), sep="")
    difference = (merged(pixel_values=images).logits - expected).abs().max() / expected.abs().max()
print(f"largest difference: {difference:.1e} of the largest logit")

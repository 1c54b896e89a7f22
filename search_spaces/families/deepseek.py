"""DeepSeek-OCR's image encoder: rotary position embedding, gated MLPs."""

from search_spaces.blocks import pre_norm

FORMS = {"DeepseekVitBlock": pre_norm("rope")}

"""The Qwen2.5-Omni thinker: vision, audio and text towers as pure functions over a params dict."""

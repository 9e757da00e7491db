"""The page: chat, pictures, documents and attention in a browser, over the server's own interface.

`dreamllm demo` serves it. The page is plain HTML, CSS and JavaScript of this folder and fetches nothing from elsewhere.
"""

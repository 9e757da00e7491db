"""DreamLLM for other evaluation programs. Each module needs the program it is for; nothing else imports them."""

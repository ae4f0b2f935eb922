// SPDX-License-Identifier: GPL-2.0
/* Stands in for NVIDIA's module: there to be used by nvidia-uvm, and to be unloaded. */

#include <linux/module.h>

void nvidia_stand_in(void);
void nvidia_stand_in(void)
{
}
EXPORT_SYMBOL_GPL(nvidia_stand_in);

static int __init nvidia_init(void)
{
	return 0;
}
module_init(nvidia_init);

static void __exit nvidia_exit(void)
{
}
module_exit(nvidia_exit);

MODULE_DESCRIPTION("Stand-in for NVIDIA's module");
MODULE_LICENSE("GPL");

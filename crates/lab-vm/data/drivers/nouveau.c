// SPDX-License-Identifier: GPL-2.0
/* Stands in for nouveau: takes a device that is told to it, and lets go of it as slowly as is asked for. */

#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/pci.h>

/* Looked at again all the time: setting it to 0 ends the wait. */
static unsigned int unbind_ms;
module_param(unbind_ms, uint, 0644);
MODULE_PARM_DESC(unbind_ms, "Time that it takes to let go of a device, in milliseconds");

static int nouveau_probe(struct pci_dev *dev, const struct pci_device_id *id)
{
	pci_info(dev, "taken\n");
	return 0;
}

static void nouveau_remove(struct pci_dev *dev)
{
	unsigned long begun = jiffies;

	while (time_before(jiffies, begun + msecs_to_jiffies(READ_ONCE(unbind_ms))))
		msleep(10);
	pci_info(dev, "let go after %u ms\n", jiffies_to_msecs(jiffies - begun));
}

/* No table: only devices whose driver_override names it. */
static struct pci_driver nouveau_driver = {
	.name = "nouveau",
	.probe = nouveau_probe,
	.remove = nouveau_remove,
};
module_pci_driver(nouveau_driver);

MODULE_DESCRIPTION("Stand-in for nouveau");
MODULE_LICENSE("GPL");
